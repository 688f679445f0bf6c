"""The table of methods: what a row promises, what is imported when, and methods of other packages."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from tiny_models import build, inputs_for, outputs

from hf_lowrank import InputError, cli, compress, make_report, register_method
from hf_lowrank.compression.settings import ALLOCATION_NAMES, EMBEDDING_OBJECTIVES, GROUP_NAMES, CompressOptions
from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.methods.matrix.svd import SVD, decompose
from hf_lowrank.methods.metric import DiagonalMetric, identity
from hf_lowrank.methods.stacking import GROUPS
from hf_lowrank.methods.table import METHOD_NAMES, METHODS, OF_MATRICES, OF_TENSORS, MethodRow, find_method
from hf_lowrank.methods.tables.token_tables import OBJECTIVES
from hf_lowrank.options import option
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.budgets import BUDGETS
from hf_lowrank.sharing.cards.card import make_card
from hf_lowrank.statistics.collection import STATISTICS
from hf_lowrank.training.recovery import default_learning_rate

OUTSIDE = Path(__file__).resolve().parents[1] / "examples" / "outside_method"
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def dense(tmp_path):
    build("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example's package, as pip leaves it."""
    about = tmp_path / "site" / "relative_svd-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: relative-svd\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(
        "[hf_lowrank.methods]\nrelative_svd = relative_svd:ROW\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(OUTSIDE))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("relative_svd", None)


@each_method
def test_a_row_says_in_a_line_what_a_method_does_and_where_it_is(name):
    row = METHODS[name]

    assert row.summary
    assert "\n" not in row.summary
    assert row.takes in (OF_MATRICES, OF_TENSORS)
    assert row.method.needs <= set(STATISTICS)
    assert callable(row.method.plan)
    assert callable(row.method.solve)


def test_what_can_be_chosen_is_what_there_is():
    assert (tuple(ALLOCATIONS), tuple(OBJECTIVES)) == (ALLOCATION_NAMES, EMBEDDING_OBJECTIVES)
    assert GROUP_NAMES == GROUPS
    tags = {tag for field in fields(CompressOptions) for tag in field.metadata["of"]}
    assert tags <= {OF_MATRICES, OF_TENSORS, *METHODS}


def test_the_table_and_the_options_are_there_without_torch():
    code = "import sys, hf_lowrank.compression.settings as s; print(len(list(s.METHOD_NAMES)), 'torch' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said.split() == [str(len(METHODS)), "False"]


def test_an_unknown_method_is_told_the_closest():
    with pytest.raises(InputError, match=r"method must be one of .*got 'whitend_svd'. Closest: 'whitened_svd'"):
        compress(build("BertModel"), method="whitend_svd", keep_targets=0.5)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, field.name)
        for name, row in METHODS.items()
        for field in fields(CompressOptions)
        if field.metadata["of"] and not {name, row.takes} & set(field.metadata["of"])
    ],
)
def test_an_option_that_a_method_does_not_take_is_refused(name, option):
    values = {"rank_pattern": {"query": 2}, "ranks": (3,), "allocation": "energy", "fast": True}
    values |= {"storage": "pivoted", "embeddings": "low_rank", "embedding_objective": "direction", "anchored": True}
    values |= {"refine_block_passes": 1, "refine_passes": 1, "refine_learning_rate": 1e-3, "bias_correction": True}
    most = CompressOptions.__dataclass_fields__[option].metadata["at_most"]
    value = {**values, "group": "attention"}.get(option, 0.5 if option in BUDGETS else most)
    budget = {} if METHODS[name].ranks or option in BUDGETS else {"keep_targets": 0.5}

    with pytest.raises(InputError, match=f"{option} does not go with method={name}"):
        CompressOptions(method=name, **budget, **{option: value})


def test_a_method_of_another_package_is_one_in_python_and_on_the_command_line(installed, dense, tmp_path, capsys):
    command = ["compress", str(dense), str(tmp_path / "small"), "--method", "relative_svd", "--keep-targets", "0.5"]

    assert "relative_svd" in METHOD_NAMES
    assert cli.main([*command, "--no-latency", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["provenance"]["settings"]["method"] == "relative_svd"
    found, plain = (
        outputs(compress(dense, method=method, keep_targets=0.5), inputs_for("BertForMaskedLM"))["logits"]
        for method in ("relative_svd", "svd")
    )
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)


def test_a_registered_method_is_one_for_this_process(monkeypatch, dense):
    monkeypatch.setattr("hf_lowrank.methods.table.METHODS", dict(METHODS))
    register_method("plain", replace(METHODS["svd"], summary="as svd"))

    first, second = (compress(dense, method=method, rank=4) for method in ("plain", "svd"))

    assert find_method("plain").summary == "as svd"
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    with pytest.raises(InputError, match="a method 'plain' already"):
        register_method("plain", METHODS["svd"])
    with pytest.raises(InputError, match="must be a MethodRow, got"):
        register_method("other", "my_package:METHOD")


@dataclass(frozen=True, kw_only=True)
class MoreOptions(CompressOptions):
    """The options of `compress`, and one more.

    Args:
        power: Of the length of a row, what it counts by.
    """

    power: float = option(0.0, of=["powered_svd"], flags="choice")


@dataclass
class PoweredSVD(SVD):
    power: float = 0.0

    def decompose(self, weight, statistics=None):
        return decompose(weight, DiagonalMetric(weight.double().norm(dim=1) ** self.power), identity())


POWERED_SVD = MatrixMethod(PoweredSVD())


def test_an_option_of_one_method_reaches_its_solver_and_the_command_line(monkeypatch, dense, tmp_path):
    monkeypatch.setattr("hf_lowrank.methods.table.METHODS", dict(METHODS))
    for module in ("compression.settled", "cli.flags.parser", "cli.compress"):
        monkeypatch.setattr(f"hf_lowrank.{module}.CompressOptions", MoreOptions)
    row = MethodRow(home=f"{__name__}:POWERED_SVD", summary="rows by their length", takes=OF_MATRICES)
    register_method("powered_svd", row)
    given = {"keep_targets": 0.5, "storage": "low_rank", "cache_dir": str(tmp_path / "cache")}
    command = ["compress", str(dense), str(tmp_path / "small"), "--method", "powered_svd", "--keep-targets", "0.5"]

    made = [compress(dense, method="powered_svd", power=power, **given) for power in (-1.0, 0.0, -1.0)]
    plain = compress(dense, method="svd", **given)

    first, second, again, svd = ([*small.state_dict().values()] for small in (*made, plain))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, second, svd))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, svd, strict=True))
    assert cli.main([*command, "--power", "-1", "--no-latency"]) == 0
    with pytest.raises(InputError, match="power does not go with method=svd"):
        compress(dense, method="svd", power=1.0, keep_targets=0.5)


def test_where_the_package_of_a_method_is_not_installed_its_models_have_cards_all_the_same(dense):
    small = compress(dense, method="svd", rank=4)
    small.config.compression["provenance"]["settings"]["method"] = "relative_svd"

    assert "relative_svd" in make_card(make_report(small), "small").text
    assert default_learning_rate(small) == 5e-5
