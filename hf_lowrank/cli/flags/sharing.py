"""What `export`, `push`, `card` and `doctor` can be told."""

from hf_lowrank.cli.flags.commands import Commands, add_command
from hf_lowrank.options import add_flags
from hf_lowrank.runtimes.options import ExportOptions
from hf_lowrank.sharing.push_options import PushOptions

_PUSH_EXAMPLES = """examples:
  hf-lowrank push small-bert me/small-bert --dry-run         list the files
  hf-lowrank push small-bert me/small-bert --private
  hf-lowrank push small-bert someone/small-bert --revision smaller

The folder is verified first, and everything is published in one commit, by the token in HF_TOKEN or that of
`hf auth login`. Interrupted, run it again."""

_EXPORT_EXAMPLES = """examples:
  hf-lowrank export small-bert                                        onnx/model.onnx
  hf-lowrank export small-bert --precision int8                       onnx/model_qint8_avx512_vnni.onnx
  hf-lowrank export small-bert --runtime openvino --precision int8    openvino/openvino_model_qint8_quantized.xml

Every file is compared with the model on text before it appears in the folder."""

_CARD_EXAMPLES = """examples:
  hf-lowrank card small-bert
  hf-lowrank card small-bert --base-model google-bert/bert-base-uncased --license apache-2.0

What you wrote below the card's last line is kept."""


def add_sharing_commands(commands: Commands) -> None:
    """Add the commands that share a model, and the one that looks for what stands in the way."""
    parser = add_command(commands, "export", "write the files by which other runtimes run a model", _EXPORT_EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="folder of a compressed model")
    add_flags(parser, ExportOptions, ["runtime", "precision", "force"])
    _add_push(commands)
    _add_card(commands)
    summary = "show versions, machine and caches, and what commonly stands in the way"
    parser = add_command(commands, "doctor", summary)
    parser.add_argument("path", metavar="PATH", nargs="?", help="model folder to look at as well")


def _add_push(commands: Commands) -> None:
    parser = add_command(commands, "push", "publish a compressed model on the Hub", _PUSH_EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="folder of a compressed model")
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub; made if it does not exist")
    flags = ("private", "revision", "dry_run", "include", "trust_remote_code")
    add_flags(parser, PushOptions, flags)


def _add_card(commands: Commands) -> None:
    parser = add_command(
        commands, "card", "write the card of a compressed model again, from its report", _CARD_EXAMPLES
    )
    parser.add_argument("path", metavar="PATH", help="folder of a compressed model")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base-model", metavar="ID", help="Hub id of the dense model, where it was a local copy")
    base.add_argument("--finetuned-from", metavar="ID", help="Hub id of what the dense model was fine-tuned from")
    parser.add_argument("--license", help="of the dense model, as the Hub writes it, such as apache-2.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="such as en de")
