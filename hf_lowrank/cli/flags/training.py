"""What the commands that train can be told."""

from hf_lowrank.cli.flags.commands import Commands, Parser, add_command, add_out
from hf_lowrank.options import add_flags
from hf_lowrank.training.options import LPAFOptions, RecoveryOptions

_RECOVER_EXAMPLES = """examples:
  hf-lowrank recover small-bert healed-bert --teacher my-bert --dataset train.tsv
  hf-lowrank recover small-gpt2 healed --teacher my-gpt2 --dataset texts.txt --epochs 1
  hf-lowrank recover small healed --teacher my-bert --dataset nyu-mll/glue:sst2:train --losses logits=1 task=0.5
  hf-lowrank recover small healed --teacher my-bert --dataset train.tsv --work-dir run   goes on after a kill

The state with the least loss on examples set aside is kept; the one before the training competes."""

_LPAF_EXAMPLES = """examples:
  hf-lowrank lpaf bert-on-sst2 small --dataset train.tsv --keep-targets 0.25
  hf-lowrank lpaf bert-on-sst2 small --dataset train.tsv --keep-targets 0.25 --work-dir run   goes on after a kill

MODEL is fine-tuned on the task already. Prunes it, factorizes what is left, trains the factors, both
towards the model as it was."""

_SHARED = ["text_column", "label_column", "max_examples", "batch_size", "work_dir"]


def add_training_commands(commands: Commands) -> None:
    """Add the commands that train."""
    parser = add_command(commands, "recover", "train a compressed model back towards the dense one", _RECOVER_EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a compressed model")
    _add_data(parser)
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="the dense model it came from")
    add_flags(parser, RecoveryOptions, ["losses", "epochs", "learning_rate", *_SHARED])
    _add_lpaf(commands)


def _add_lpaf(commands: Commands) -> None:
    parser = add_command(commands, "lpaf", "prune, factorize and train a fine-tuned model", _LPAF_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model fine-tuned on the task")
    _add_data(parser)
    parser.add_argument(
        "--keep-targets", type=float, metavar="F", required=True, help="fraction of the replaced matrices that stays"
    )
    add_flags(parser, LPAFOptions, ["prune_epochs", "tune_epochs", *_SHARED])


def _add_data(parser: Parser) -> None:
    add_out(parser)
    parser.add_argument("--dataset", metavar="DATA", required=True, help="file, or NAME:CONFIG:SPLIT of the Hub")
