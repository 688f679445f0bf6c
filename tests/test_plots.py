"""Pictures are written, whole, and say what their tables say."""

import base64
import re
from html import unescape

import pytest
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer

from hf_lowrank import InputError
from hf_lowrank.cli import main
from hf_lowrank.evaluation import make_task
from hf_lowrank.studies.analysis import analyze
from hf_lowrank.studies.comparison import compare
from hf_lowrank.studies.plots import analysis_figure, comparison_figure, save_page

PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = [" ".join(LETTERS[number:]) for number in range(20)]


@pytest.fixture(scope="module")
def dense():
    return build("BertForMaskedLM")


@pytest.fixture(scope="module")
def analysis(dense):
    return analyze(dense, keep_targets=[0.6, 0.3])


@pytest.fixture(scope="module")
def comparison(dense):
    task = make_task("masked-lm", block_length=16)
    methods = ["svd", "whitened_svd:uniform"]
    return compare(dense, TEXTS, task, methods=methods, budgets=[0.6, 0.3], tokenizer=encoder_tokenizer())


@pytest.fixture(params=["analysis", "comparison"])
def result(request):
    return request.getfixturevalue(request.param)


def test_a_png_is_a_picture(result, tmp_path):
    save_page(result, tmp_path / "page.png")

    content = (tmp_path / "page.png").read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 10_000


def test_a_page_holds_the_picture_and_every_cell_of_the_tables_and_needs_nothing_else(result, tmp_path):
    save_page(result, tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text()
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', page)[1]
    assert base64.b64decode(picture).startswith(PNG)
    assert not re.search(r"https?://|<script", page)
    cells = [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", page)]
    assert cells == [cell for _, (_, *rows) in result.tables() for row in rows for cell in row]


def test_the_analysis_shows_every_kind_of_matrix_and_every_budget(analysis):
    figure = analysis_figure(analysis)

    titles = [axes.get_title() for axes in figure.axes]
    for name in ("attention.self.query", "attention.output.dense", "output.dense", "embeddings.word_embeddings"):
        assert sum(title.split(" ")[0] == name for title in titles) == 1
    assert {"keep_targets 0.6", "keep_targets 0.3"} <= set(titles)


def test_the_map_shows_the_fractions_kept(analysis):
    figure = analysis_figure(analysis)
    panel = next(axes for axes in figure.axes if axes.get_title() == "keep_targets 0.3")

    shown = panel.images[0].get_array()
    expected = [m.planned[1].parameters / m.parameters for m in analysis.matrices if m.planned]
    assert sorted(shown.ravel().tolist()) == pytest.approx(sorted(expected))


def test_curves_are_told_apart_without_color(comparison):
    (panel,) = comparison_figure(comparison).axes

    looks = {(line.get_marker(), line.get_linestyle()) for line in panel.lines}
    assert len(looks) == len(panel.lines) == 3
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["svd", "whitened_svd:uniform", "dense"]
    assert panel.get_ylabel() == "perplexity (lower is better)"


@pytest.mark.parametrize(("name", "message"), [("a.pdf", ".png or .html"), ("none/a.png", "There is no folder")])
def test_a_plot_that_cannot_be_written_is_refused_before_any_work(analysis, tmp_path, capsys, name, message):
    with pytest.raises(InputError, match=message):
        save_page(analysis, tmp_path / name)

    assert main(["analyze", str(tmp_path / "no-model"), "--plot", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_the_command_draws(dense, tmp_path, capsys):
    dense.save_pretrained(tmp_path / "dense")

    argv = ["analyze", str(tmp_path / "dense"), "--method", "svd", "--plot", str(tmp_path / "page.html")]
    assert main(argv) == 0

    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert "Every matrix" in (tmp_path / "page.html").read_text()


def test_layers_that_are_no_targets_stay_blank_in_the_map(dense):
    analysis = analyze(dense, method="svd", keep_targets=0.5, target_modules=["layer.1.output.dense", "query"])

    panel = next(axes for axes in analysis_figure(analysis).axes if axes.get_title() == "keep_targets 0.5")

    assert panel.images[0].get_array().count() == 3


def test_the_layers_of_a_deep_model_are_named_right_in_the_map():
    analysis = analyze(build("BertModel", num_hidden_layers=14), method="svd", keep_targets=0.5)

    panel = next(axes for axes in analysis_figure(analysis).axes if axes.get_title() == "keep_targets 0.5")

    ticks = dict(zip(panel.get_yticks(), (label.get_text() for label in panel.get_yticklabels()), strict=True))
    assert ticks == {float(layer): str(layer) for layer in range(0, 14, 2)}
