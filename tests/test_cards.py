"""A card says what was measured and nothing else, to people and to the Hub; it comes out of one stored report."""

import json
import math
import re
from dataclasses import replace

import pytest
import yaml
from every_method import SOLVERS, TENSOR_METHODS
from huggingface_hub import ModelCard, parse_eval_result_entries
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer

import hf_lowrank
from hf_lowrank import InputError, compress, evaluate, record_evaluation, saved_report
from hf_lowrank.cli import main
from hf_lowrank.hosts.latency import Latency
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.methods import papers
from hf_lowrank.methods.table import paper_of
from hf_lowrank.records.latency import LatencyReport
from hf_lowrank.records.machine import machine_name
from hf_lowrank.records.origin import Origin, find_origin
from hf_lowrank.records.report import CompressionReport, ModuleReport, QualityReport, make_report
from hf_lowrank.sharing.cards.card import KEPT_LINE, REPORT_FILE, make_card, shown_command
from hf_lowrank.sharing.cards.metadata import RESULTS_FILE, results_file
from hf_lowrank.sharing.cards.pictures import rank_picture
from hf_lowrank.sharing.record import read_record, record_bytes, write_record
from hf_lowrank.sharing.saving import load_compressed, save_folder

CARD = "---\nlicense: mit\nlanguage: [en, de]\npipeline_tag: fill-mask\n---\n# dense\n"
LATENCY = LatencyReport(8, 20, "a machine", Latency(0.02, 0.01, 0.03, 1.0), Latency(0.01, 0.01, 0.02, 2.0))
QUALITY = QualityReport(
    task="similarity",
    dataset="owner/stsb",
    config="en",
    split="test",
    is_on_hub=True,
    sha256=None,
    metric="spearman",
    higher_is_better=True,
    options={},
    scores={"spearman": 0.8123},
    dense_scores={"spearman": 0.8223},
    date="2026-11-21",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "tiny-bert"
    build("BertForMaskedLM").save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def small(dense):
    return compress(dense, keep_params=0.6, method="svd")


@pytest.fixture
def folder(small, dense, tmp_path):
    return save_folder(small, tmp_path / "tiny", dense)


@pytest.fixture(scope="module")
def report(small):
    return replace(make_report(small), latency=LATENCY, quality=(QUALITY,))


def rows_of(card):
    return [line for line in str(card).splitlines() if line.startswith("| ")]


def test_the_first_screen_says_how_to_load_it_how_small_how_fast_and_how_good(report):
    text = make_card(report, "user/tiny").text
    top = text[: text.index("## How it was made")]

    assert top.index('pipeline("fill-mask", model="user/tiny", trust_remote_code=True)') < top.index("| parameters")
    for name in ("parameters", "weights", "multiply-adds", "latency of 8 x 20", "spearman, similarity on owner/stsb"):
        assert f"| {name}" in top
    assert "| 0.8223 | 0.8123 | -0.0100; higher is better |" in top
    assert "20.0 ms | 10.0 ms | 2.00x as fast" in top
    assert len(top.splitlines()) < 30


def test_the_snippet_of_a_card_runs(folder):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]

    found = {}
    exec(code.replace('model="tiny"', f"model={str(folder)!r}").replace("run(f", "answer = run(f"), found)

    assert len(found["answer"]) == 5


def test_the_table_holds_the_numbers_of_the_report(report):
    rows = {
        row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows_of(make_card(report, "x"))
    }

    assert rows["parameters"][:2] == [f"{report.dense_parameters:,}", f"{report.parameters:,}"]
    assert rows["parameters"][2] == f"{report.parameters / report.dense_parameters:.1%}"


def test_what_was_not_measured_is_not_claimed(small):
    text = str(make_card(make_report(small), "tiny"))

    assert "Quality was not evaluated" in text
    assert "latency" not in text
    assert "model-index" not in text


def test_a_dense_model_that_was_not_evaluated_has_no_number(report):
    entry = replace(QUALITY, dense_scores={})

    row = rows_of(make_card(replace(report, quality=(entry,)), "tiny"))[-1]

    assert "| not measured | 0.8123 |" in row


def test_the_front_matter_is_valid_and_inherits_what_the_dense_card_says(report):
    data = ModelCard(str(make_card(report, "user/tiny"))).data

    assert (data.license, data.language, data.pipeline_tag) == ("mit", ["en", "de"], "fill-mask")
    assert data.library_name == "transformers"
    assert {"hf_lowrank", "low-rank", "svd", "custom_code"} <= set(data.tags)
    result = data.eval_results[0]
    assert (result.task_type, result.dataset_type, result.dataset_config) == (
        "sentence-similarity",
        "owner/stsb",
        "en",
    )
    assert (result.metric_type, result.metric_value) == ("spearmanr", 0.8123)


@pytest.mark.parametrize(
    ("origin", "training", "expected"),
    [
        (Origin(name="a/b", base_model="a/b", is_base=True), (), "quantized"),
        (Origin(name="a/b", base_model="a/b", is_base=True), ({"steps": 1},), "finetune"),
        (Origin(name="mine", base_model="a/b"), (), "finetune"),
        (Origin(name="mine"), (), None),
    ],
)
def test_the_relation_to_the_base_model_is_one_the_hub_knows(report, origin, training, expected):
    data = make_card(replace(report, origin=origin, training=training), "tiny").data.to_dict()

    assert data.get("base_model_relation") == expected
    assert data.get("base_model") == (None if expected is None else "a/b")


def test_an_unknown_license_stays_unknown(report):
    card = make_card(replace(report, origin=Origin(name="a/b", base_model="a/b", is_base=True)), "tiny")

    assert "license" not in card.data.to_dict()
    assert "license of the dense model is not known" in card.text


def test_calibration_sets_of_the_hub_are_named_and_files_are_not(report):
    def datasets(source):
        text = {"source": source, "num_tokens": 10, "sha256": "ab" * 32}
        return (
            make_card(replace(report, provenance={**report.provenance, "text": text}), "x")
            .data.to_dict()
            .get("datasets")
        )

    assert datasets("owner/texts:en:train") == ["owner/texts"]
    assert datasets("texts.txt") is None
    assert datasets("synthetic") is None


def test_evaluation_results_are_as_the_hub_reads_them():
    entries = parse_eval_result_entries(yaml.safe_load(results_file([QUALITY])))

    assert [(entry.dataset_id, entry.task_id, entry.value, entry.date) for entry in entries] == [
        ("owner/stsb", "en", 0.8123, "2026-11-21")
    ]
    assert "the dense model: 0.8223" in entries[0].notes


def test_evaluation_results_are_of_data_sets_of_the_hub_alone():
    assert results_file([replace(QUALITY, is_on_hub=False), replace(QUALITY, task="agreement")]) is None


@pytest.mark.parametrize("method", [*SOLVERS, *TENSOR_METHODS])
def test_every_method_names_its_paper(report, method):
    settings = {**report.provenance["settings"], "method": method}

    text = make_card(replace(report, provenance={**report.provenance, "settings": settings}), "x").text

    bibtex = paper_of(method).bibtex
    assert bibtex in text
    assert bibtex.count("{") == bibtex.count("}")


def test_ways_to_do_a_method_have_its_paper():
    assert paper_of("tucker-IV-72-384") is paper_of("whitened_tucker") is papers.REN
    assert paper_of("shared_tensor_train") is not paper_of("whitened_tensor_train") is papers.OSELEDETS
    assert paper_of("separated_nonlinear_autoencoder") is papers.BANAEI
    assert paper_of("unheard_of") is None


STEP = {"before": 0.25, "after": 0.125, "passes": 2, "learning_rate": 1e-4}
LEARNING = {
    "anchoring": {"before": 0.5, "after": 0.25, "accepted": ["a", "b"], "refused": ["c"]},
    "block_refinement": {"a": {**STEP, "before": 0.3, "after": 0.2}, "b": {**STEP, "passes": 0, "after": 0.15}},
    "refinement": STEP,
}


def test_what_was_learnt_after_the_first_solution_is_on_the_card(report):
    text = make_card(replace(report, provenance={**report.provenance, **LEARNING}), "x").text

    assert "Anchored: 2 of 3 blocks" in text
    assert "on text set aside 0.5 -> 0.25." in text
    assert (
        "Trained block by block: 1 of 2 blocks gained; distance of the outputs on text set aside 0.3 -> 0.15." in text
    )
    assert "2 passes at a rate of 0.0001; distance of the outputs on text set aside 0.25 -> 0.125." in text


def test_what_did_not_help_is_said(report):
    refinement = {**STEP, "passes": 0, "after": 0.25}

    text = make_card(replace(report, provenance={**report.provenance, "refinement": refinement}), "x").text

    assert "no pass helped, so none was kept; distance of the outputs on text set aside 0.25 -> 0.25." in text


def test_a_tensor_method_says_what_is_shared_and_counts_as_its_paper_does():
    tensor = make_report(compress(build("BertForMaskedLM"), method="tucker", ranks=(5, 9, 9), group="attention"))
    card = make_card(tensor, "x")

    assert "Method `tucker`, budget `ranks=" in card.text
    assert ", group `attention`; 8 matrices replaced, 0 left dense, 1 shared by several." in card.text
    assert [row.split(" | ")[0] for row in rows_of(card)][2:4] == [
        "| ... outside the token embedding",
        "| ... in the replaced matrices",
    ]


def test_a_report_is_the_same_after_it_is_stored(report):
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_saved_folder_has_its_report_and_the_card_that_is_written_from_it(folder):
    stored = json.loads((folder / REPORT_FILE).read_text())

    assert CompressionReport.from_dict(stored) == saved_report(folder)
    assert (folder / "README.md").read_text() == str(make_card(saved_report(folder), "tiny"))


def test_the_record_takes_no_more_bytes_than_were_set_aside(folder, dense):
    write_record(folder, replace(saved_report(folder), latency=LATENCY))

    written = sum((folder / name).stat().st_size for name in (REPORT_FILE, "README.md"))

    assert written <= record_bytes(build("BertForMaskedLM"))


def test_numbers_of_other_weights_are_not_shown(folder, small):
    write_record(folder, replace(saved_report(folder), quality=(QUALITY,)))
    assert saved_report(folder).quality
    for parameter in small.parameters():
        changed = parameter.data
        break
    original = changed.clone()
    changed.add_(1)
    small.save_pretrained(folder)
    changed.copy_(original)

    assert read_record(folder) is None
    assert not saved_report(folder).quality


def test_a_damaged_report_is_named(folder):
    (folder / REPORT_FILE).write_text('{"format_version": 1}')

    with pytest.raises(InputError, match=rf"{REPORT_FILE} is damaged"):
        saved_report(folder)


def test_evaluate_appends_to_the_report_and_the_card(folder, dense, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join("a b c d e f g h" for _ in range(8)))
    argv = ["evaluate", folder, "--dense", dense, "--task", "masked-lm", "--dataset", tmp_path / "texts.txt"]
    argv += ["--block-length", "16", "--no-cost", "--json", "--record"]

    assert [main([str(part) for part in argv]) for _ in range(2)] == [0, 0]

    found = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{\n", ""]))["evaluation"]
    (entry,) = saved_report(folder).quality  # evaluated twice, kept once
    assert entry.scores == found["model"]["scores"]
    assert entry.dense_scores == found["dense"]["scores"]
    assert entry.dataset == f"{tmp_path.name}/texts.txt"
    assert f"perplexity, masked-lm on {tmp_path.name}/texts.txt" in (folder / "README.md").read_text()


def test_only_the_folder_of_a_compressed_model_keeps_a_record(dense, capsys):
    argv = ["evaluate", str(dense), "--task", "masked-lm", "--dataset", "x.txt", "--record"]

    assert main(argv) == 2
    assert "--record needs the folder of a compressed model" in capsys.readouterr().err


def test_record_evaluation_is_what_the_command_does(folder, dense):
    model = load_compressed(folder)
    texts = ["a b c d e f g h"] * 8

    evaluation = evaluate(model, texts, "masked-lm", tokenizer=encoder_tokenizer(), cost=False, block_length=16)
    record_evaluation(folder, evaluation, "owner/texts:en:test")

    (entry,) = saved_report(folder).quality
    assert (entry.dataset, entry.config, entry.split, entry.is_on_hub) == ("owner/texts", "en", "test", True)
    assert yaml.safe_load((folder / RESULTS_FILE).read_text())[0]["dataset"]["id"] == "owner/texts"


def test_an_evaluation_beside_the_dense_model_gives_a_record_its_speed_where_it_has_none(folder, dense):
    model, texts = load_compressed(folder), ["a b c d e f g h"] * 8
    options = {"tokenizer": encoder_tokenizer(), "block_length": 16}
    for stock in (None, load_dense(dense)):
        record_evaluation(folder, evaluate(model, texts, "masked-lm", dense=stock, **options), "owner/texts")
        first = saved_report(folder).latency
        assert (first is None) == (stock is None)

    record_evaluation(folder, evaluate(model, texts, "masked-lm", dense=stock, **options), "owner/texts")

    assert saved_report(folder).latency == first
    assert first.machine == machine_name()


def test_the_card_is_written_again_with_what_is_said_and_keeps_what_the_user_wrote(folder, capsys):
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")

    argv = ["card", str(folder), "--base-model", "a/b", "--license", "apache-2.0", "--language", "fr", "--json"]
    assert main(argv) == 0
    assert main(["card", str(folder), "--json"]) == 0

    data = ModelCard.load(card).data
    assert (data.base_model, data.license, data.language) == ("a/b", "apache-2.0", ["fr"])
    assert card.read_text().endswith(f"{KEPT_LINE}\nMy own words.\n")
    assert json.loads(capsys.readouterr().out.rpartition("}\n{")[2].join(["{", ""]))["card"] == str(card)


def test_what_the_dense_model_was_fine_tuned_from_is_named_beside_it(folder):
    name = saved_report(folder).origin.name

    assert main(["card", str(folder), "--finetuned-from", "a/b"]) == 0

    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("a/b", "finetune")
    assert f"{name} (from [a/b](https://huggingface.co/a/b)) with" in card.text
    assert saved_report(folder).origin.name == name


def test_a_card_of_the_users_is_never_replaced(folder, capsys):
    (folder / "README.md").write_text("# Mine\n")

    write_record(folder, saved_report(folder))
    assert main(["card", str(folder)]) == 2
    assert "move it away" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "# Mine\n"
    (folder / "README.md").unlink()
    assert main(["card", str(folder)]) == 0
    assert KEPT_LINE in (folder / "README.md").read_text()


def test_no_token_and_no_place_on_this_machine_is_in_card_or_report(dense, tmp_path):
    token = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"
    out = tmp_path / "out"

    assert main(["compress", str(dense), str(out), "--rank", "4", "--method", "svd", "--no-latency"]) == 0
    report = saved_report(out)
    write_record(out, replace(report, provenance={**report.provenance, "command": f"compress --token {token}"}))

    for name in ("README.md", REPORT_FILE):
        text = (out / name).read_text()
        assert token not in text
        assert str(tmp_path) not in text
        assert str(dense.parent) not in text
    assert "hf_***" in (out / "README.md").read_text()


def test_the_command_is_shown_as_it_was_given():
    given = ["compress", "/home/me/bert", "/tmp/out dir", "--keep-params", "0.6", "--x", "hf_1234567890123"]

    shown = shown_command(given, "/home/me/bert")

    assert shown == "hf-lowrank compress @MODEL@ 'out dir' --keep-params 0.6 --x hf_***"


def test_the_command_names_the_precision_that_the_environment_sets(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    assert shown_command(["lpaf", "bert"], "gpt2") == "ACCELERATE_MIXED_PRECISION=bf16 hf-lowrank lpaf bert"


def test_the_command_names_the_dense_model_as_others_find_it(report):
    provenance = {**report.provenance, "command": shown_command(["compress", "/home/bert", "out"], "/home/bert")}

    text = make_card(replace(report, provenance=provenance, origin=Origin("a/b", "a/b", is_base=True)), "x").text

    assert "```bash\nhf-lowrank compress a/b out\n```" in text


def test_a_recovery_is_a_training(small):
    found = {"before": 2.0, "after": 1.23456, "steps": 30, "losses": {"logits": 1.0, "hidden": 0.5}}
    plan = small.config.plan
    plan["provenance"]["recovery"] = found
    report = make_report(small)
    del plan["provenance"]["recovery"]

    assert report.training == ({"by": "recover", **found},)
    said = "before 2, after 1.235, steps 30, losses (logits 1, hidden 0.5)"
    assert f"Trained after compression by `recover`: {said}." in make_card(report, "x").text


def test_what_lpaf_made_is_called_so(small):
    plan = small.config.plan
    plan["provenance"]["lpaf"] = {"prune_epochs": 3, "ranks_after_pruning": {"query": {"rank": 3}}}
    card = make_card(make_report(small), "x")
    del plan["provenance"]["lpaf"]

    assert "lpaf" in card.data.tags
    assert "Pruned before compression and trained after it by `lpaf`: prune epochs 3." in card.text
    assert "Prune-And-Factorize" in card.text
    assert "Method `svd`" in card.text


def test_ranks_are_drawn_layer_by_layer():
    def module(name, structure, rank, parameters, shape=(8, 8)):
        size = math.prod(shape)
        return ModuleReport(name, structure, rank, shape, size, parameters, size, parameters, None)

    picture = rank_picture(
        [
            module("h.10.key", "dense", None, 64),
            module("h.2.key", "low_rank", 1, 16),
            module("h.0.key", "low_rank", 3, 48),
            module("h.0.value", "kronecker_sum", 12, 384, (8, 32)),
            module("wte", "low_rank_embedding", 2, 32),
        ]
    )

    assert picture.splitlines() == [
        "h.*.key    ▆▂█  rank 1 to 3 of 8",
        "h.*.value  ▇    rank 12 of 16",
        "wte        ▄    rank 2 of 8",
    ]


CACHED = "models--owner--name/snapshots/" + "ab" * 20


@pytest.mark.parametrize(
    ("place", "card", "expected"),
    [
        ("mine", CARD, Origin("mine", license="mit", language=("en", "de"), pipeline_tag="fill-mask")),
        ("mine", "---\nbase_model: a/b\n---\n", Origin("mine", base_model="a/b")),
        ("mine", "---\nlicense: [unclosed\n---\n", Origin("mine")),
        ("mine", None, Origin("mine")),
        (CACHED, None, Origin("owner/name", base_model="owner/name", is_base=True, revision="ab" * 20)),
    ],
)
def test_the_origin_is_what_the_model_says_of_itself(tmp_path, place, card, expected):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if card is not None:
        (folder / "README.md").write_text(card)

    assert find_origin(str(folder)) == expected


def test_a_hub_id_out_of_reach_is_known_by_name_alone():
    assert find_origin("a/b", "c" * 40) == Origin("a/b", base_model="a/b", is_base=True, revision="c" * 40)
    assert find_origin("") == Origin()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("BertForMaskedLM", 'pipeline("fill-mask"'),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering.from_pretrained"),
        ("BertForPreTraining", "AutoModelForPreTraining.from_pretrained"),
        ("GPT2LMHeadModel", 'pipeline("text-generation"'),
        ("GPT2DoubleHeadsModel", 'pipeline("feature-extraction"'),
        ("BertModel", 'pipeline("feature-extraction"'),
    ],
)
def test_the_snippet_suits_the_head(report, head, expected):
    assert expected in make_card(replace(report, architecture=f"LowRank{head}"), "x").text


def test_a_sentence_encoder_is_loaded_as_one(report):
    card = make_card(replace(report, origin=replace(report.origin, library_name="sentence-transformers")), "x")

    assert 'SentenceTransformer("x", trust_remote_code=True)' in card.text
    assert "sentence-transformers" in card.data.tags


def test_the_public_names_are_there():
    assert {"push_to_hub", "record_evaluation", "saved_report"} <= set(dir(hf_lowrank))
