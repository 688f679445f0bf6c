"""What is chosen where nobody asks: by what it does to the model, on text that nothing was made from."""

import random

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer
from transformers import AutoModel, PreTrainedTokenizerFast

from hf_lowrank import compress, make_report
from hf_lowrank.compression.job import prepare
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.hosts.outputs import run
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.matrix.method import as_planned
from hf_lowrank.methods.problem import TABLES
from hf_lowrank.methods.table import METHODS, OF_MATRICES
from hf_lowrank.remote_code.lowrank_plan import specs_of
from hf_lowrank.statistics.collection import collect_statistics
from hf_lowrank.statistics.token_counts import count_tokens, occurrences


def texts(count, letters=LETTERS):
    draw = random.Random(0)
    return [" ".join(draw.choices(letters, k=draw.randint(3, 12))) for _ in range(count)]


def saved(folder, head="BertModel", **options):
    build(head, **options).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def job(folder, calibration, **options):
    settings = settle_compression({"num_calibration_samples": 40, **options}, has_text=calibration is not None)
    return prepare(folder, settings, calibration=calibration)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.takes == OF_MATRICES])
def test_fast_is_less_text_and_no_learning_and_no_other_way_to_find_ranks(method):
    usual, fast = (
        settle_compression({"keep_targets": 0.5, "method": method, "fast": is_fast}, has_text=True)
        for is_fast in (False, True)
    )

    assert fast.allocation == usual.allocation
    assert fast.text.num_samples < usual.text.num_samples
    assert not fast.learning


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_tables_are_made_for_no_token_of_the_text_they_are_tried_on(head, tmp_path):
    folder, source = saved(tmp_path, head), texts(40)
    found = job(folder, source, keep_params=0.5).problem.evidence
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    counts, probed = found.token_counts, occurrences(found.calibration.probes, len(found.token_counts))

    written = slice(4, 4 + len(LETTERS))  # special tokens have a count of their own
    assert probed[written].sum() > 0
    assert torch.equal((counts + probed)[written], count_tokens(source, tokenizer, len(counts))[written])


@pytest.mark.parametrize(("known", "is_little"), [(LETTERS, False), (LETTERS[:3], True)])
def test_a_report_says_how_much_of_the_vocabulary_was_seen_and_warns_of_little(known, is_little, tmp_path):
    source = [*texts(32, known), *texts(8)]  # the last are those that ranks are measured on

    small = compress(saved(tmp_path), keep_params=0.4, calibration=source, max_seq_length=12, fast=True)

    report = make_report(small)
    (table,) = (module for module in report.modules if module.name.endswith("word_embeddings"))
    assert "of 97 tokens seen" in table.note
    assert ("of the token table" in report.warning) == is_little == ("others" in table.note)


@pytest.mark.parametrize(("size", "keep"), [(97, 0.75), (600, 0.35)])
def test_the_structure_of_a_table_is_what_does_the_model_less_damage(size, keep, tmp_path):
    folder, source = saved(tmp_path, vocab_size=size), texts(40, LETTERS[:8])

    def damage(**options):
        made = job(folder, source, keep_params=keep, **options)
        plan, replaced = made.plan()
        return made.settings.method.errors(as_planned(made.problem, plan)).damage(replaced, specs_of(plan))

    named = [damage(embeddings=tables) for tables in TABLES]

    assert named[0] != named[1]
    assert damage() == min(named)


@pytest.mark.parametrize("other", ["uniform", "first_order"])
def test_ranks_that_were_measured_do_no_more_damage_than_those_of_other_allocations(other, tmp_path):
    folder, source = saved(tmp_path, vocab_size=300), texts(40)

    def damage(**options):
        made = job(folder, source, keep_params=0.4, embeddings="autoencoder", **options)
        plan, replaced = made.plan()
        return made.settings.method.errors(made.problem).damage(replaced, specs_of(plan))

    assert damage() <= damage(allocation=other)


def test_gradients_of_a_head_that_speaks_once_a_text_are_of_many_draws(tmp_path):
    saved(tmp_path / "dense")
    model = AutoModel.from_pretrained(tmp_path / "dense").eval()
    draw = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(4, 90, (2, 6), generator=draw)} for _ in range(4)]
    (matrix,) = (one for one in find_matrices(model) if one.name.endswith("layer.1.output.dense"))

    found = collect_statistics(
        model, [matrix], batches, frozenset({"output_moment"}), path=tmp_path / "found", fingerprint=""
    )[matrix.name]

    exact = sum(second_moment(model, matrix, batch) for batch in batches) / found.num_tokens
    assert torch.linalg.norm(found.output_moment - exact) < 0.6 * torch.linalg.norm(exact)


def second_moment(model, matrix, batch):
    """The sum over tokens of `J^T J`, with `J` the derivative of what is said by what the matrix gives."""
    held = []
    hook = matrix.module.register_forward_hook(lambda module, inputs, output: held.append(output))
    rows = run(model, batch).rows
    hook.remove()
    gradients = [torch.autograd.grad(row.sum(), held, retain_graph=True)[0] for row in rows.T]
    flat = torch.cat(gradients).flatten(0, 1)
    return (flat.T @ flat).double()
