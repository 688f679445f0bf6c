"""Prune, factorize and train a question-answering model with mixed ranks, and print its F1 beside the dense one's.

python examples/squad_lpaf.py --model my-bert-on-squad --train train-v1.1.json --test dev-v1.1.json --out small
python examples/squad_lpaf.py --smoke        # a tiny model with random weights, seconds
"""

import argparse

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from hf_lowrank import evaluate, lpaf
from hf_lowrank.hosts.loading import load_dense

WORDS = ["where", "is", "a", "b", "c", "d", "e", "f"]


def main() -> None:
    """Compress one model that points at answers."""
    options = parse()
    torch.manual_seed(options.seed)
    if options.smoke:
        dense, tokenizer = tiny()
        train = test = [
            {"question": f"where is {word}", "context": "a b c d e f",
             "answers": {"text": [word], "answer_start": ["a b c d e f".index(word)]}}
            for word in "abcdef"
        ] * 3  # fmt: skip
        options.epochs, options.max_seq_length, options.keep_targets = 1, 16, 0.5
    else:
        dense, tokenizer = load_dense(options.model), AutoTokenizer.from_pretrained(options.model)
        train, test = options.train, options.test
    small = lpaf(
        dense,
        dataset=train,
        tokenizer=tokenizer,
        keep_targets=options.keep_targets,
        prune_epochs=options.epochs,
        tune_epochs=options.epochs,
        max_examples=options.max_examples,
        max_seq_length=options.max_seq_length,
        seed=options.seed,
        work_dir=options.work_dir,
    )
    limit = {"max_seq_length": options.max_seq_length}
    scores = evaluate(small, test, "question-answering", dense=dense, tokenizer=tokenizer, cost=False, **limit)
    for name in ("f1", "exact_match"):
        print(f"{name}: dense {scores.dense.scores[name]:.4f}, compressed {scores.model.scores[name]:.4f}")
    if options.out:
        small.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


def tiny() -> tuple[BertForQuestionAnswering, PreTrainedTokenizerFast]:
    """A model of random weights and a tokenizer of a few words."""
    names = ["[PAD]", "[CLS]", "[SEP]", *WORDS]
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForQuestionAnswering(BertConfig(vocab_size=len(names), **sizes)).eval(), PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]"
    )


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a model fine-tuned on SQuAD or its like")
    parser.add_argument("--train", help="questions to train on")
    parser.add_argument("--test", help="questions to report on")
    parser.add_argument("--keep-targets", type=float, default=0.25)
    parser.add_argument("--epochs", type=float, default=3, help="of pruning, and again of the factors")
    parser.add_argument("--max-examples", type=int)
    parser.add_argument("--max-seq-length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", help="keep checkpoints there, and go on from them after a kill")
    parser.add_argument("--out", help="folder to save to")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
