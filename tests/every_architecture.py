"""One architecture through the whole path, as a user goes it: built tiny, saved, loaded, compressed, saved, reloaded.

The outcome of a step is `done`, `refused: one line`, `crash: ...`, or what is wrong with its result.
"""

import json
import warnings
from dataclasses import dataclass, field
from functools import partial

import torch
from elsewhere import run_elsewhere
from safetensors.torch import load_file, save_file
from shrunk import build_shrunk, head_of, outputs_of

from hf_lowrank import InputError, compress, decompress, make_report, push_to_hub, recover
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.hosts.targets import is_in_block
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.sharing.verification import verify

DONE = "done"
_BATCHES = 2

# Ways to compress: options, and whether inputs are given to calibrate by.
WAYS = {"svd": ({"method": "svd"}, False), "synthetic": ({}, False), "inputs": ({}, True)}

# Run where hf_lowrank cannot be imported: loads every folder and keeps what its model returns and goes on with.
CHILD = """
from safetensors.torch import load_file, save_file
from shrunk import outputs_of
from transformers.dynamic_module_utils import get_class_from_dynamic_module

said = {}
for key, (folder, head, goes_on) in jobs["cases"].items():
    try:
        load = get_class_from_dynamic_module(f"modeling_lowrank.LowRank{head}", f"{folder}/model").from_pretrained
        model, info = load(f"{folder}/model", output_loading_info=True)
        left = {name: sorted(map(str, keys))[:2] for name, keys in info.items() if keys}
        assert not left, left
        if given := load_file(f"{folder}/given"):
            save_file(outputs_of(model, given, goes_on), f"{folder}/there")
        said[key] = "done"
    except Exception as error:
        said[key] = "crash: " + " ".join(f"{type(error).__name__}: {error}".split())[:300]
with open("said.json", "w") as file:
    json.dump(said, file)
"""


@dataclass
class Outcome:
    """What became of one architecture.

    Args:
        steps: Name of the step -> outcome.
        replaced: Way -> share of the block parameters that is replaced.
        looked_at: Share of the block parameters that is looked at.
    """

    model_type: str
    head: str
    steps: dict = field(default_factory=dict)
    replaced: dict = field(default_factory=dict)
    looked_at: float = 0.0

    def tries(self, step, action):
        """What the action gives, None where it fails; the outcome is noted."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = action()
        except (InputError, PlanError) as error:
            self.steps[step] = f"refused: {error}" if "\n" not in str(error) else "crash: a refusal of several lines"
        except Exception as error:
            self.steps[step] = f"crash: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            self.steps[step] = DONE
            return found
        return None

    @property
    def is_built(self):
        """Whether there is a tiny model, of which this library is asked."""
        return self.steps.get("build") == DONE

    def is_right(self, way):
        """Whether it is compressed in that way and computes the same without this library."""
        return all(said == DONE for step, said in self.steps.items() if step.startswith(f"{way} ")) and (
            f"{way} reload" in self.steps
        )

    @property
    def faults(self):
        """Steps that are neither done nor refused in one line, with what is wrong."""
        return {step: said for step, said in self.steps.items() if not said.startswith((DONE, "refused: "))}


def batches_like(inputs):
    """Ready batches of other values than those."""
    generator = torch.Generator().manual_seed(1)

    def drawn(name, value):
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value)
        if "mask" in name:
            return value
        order = torch.randperm(value.shape[-1] - 1, generator=generator)
        return torch.cat([value[..., :-1][..., order], value[..., -1:]], dim=-1)

    return [{name: drawn(name, value) for name, value in inputs.items()} for _ in range(_BATCHES)]


def shares(report, dense):
    """Of the block parameters of two and more dimensions: what is replaced, and what no row of the report is about."""
    parameters = [(name, p) for name, p in dense.named_parameters() if p.dim() > 1 and is_in_block(name)]
    whole = max(sum(p.numel() for _, p in parameters), 1)
    candidates = [one for one in report.modules if is_in_block(one.name)]
    replaced = sum(one.dense_parameters for one in candidates if one.structure != "dense")
    said = sum(one.dense_parameters for one in candidates)
    said += sum(one.parameters for one in report.untouched if is_in_block(one.name))
    return replaced / whole, 1 - said / whole


def try_architecture(model_type, root, ways=tuple(WAYS), is_thorough=True):
    """Go the path in a folder, up to what another process has to do; see `reloaded_`.

    Args:
        ways: Those of `WAYS` to compress by; generation and decompression follow the first.
        is_thorough: Whether that is also recovered and verified, and what would be pushed is told.
    """
    outcome = Outcome(model_type, head_of(model_type))
    dense = outcome.tries("build", lambda: _built(model_type, root / "dense"))
    if dense is None:
        return outcome
    inputs = outcome.tries("inputs", lambda: dummy_inputs(dense)) or {}
    for way in ways:
        if inputs or way != "inputs":
            small = _compressed(outcome, root, way, dense, inputs)
            if way == ways[0] and small is not None:
                stock = outcome.tries("decompress", partial(decompress, small))
                if stock is not None:
                    outcome.tries("load decompressed", partial(_check_stock, stock, root / "stock"))
                if is_thorough:
                    _prove(outcome, root, way, inputs)
    return outcome


def _built(model_type, folder):
    build_shrunk(model_type).save_pretrained(folder)
    return load_dense(folder)


def _compressed(outcome, root, way, dense, inputs):
    options, has_inputs = WAYS[way]
    options = {**options, "calibration": batches_like(inputs)} if has_inputs else options
    small = outcome.tries(f"{way} compress", lambda: compress(root / "dense", keep_targets=0.5, **options))
    if small is None:
        return None
    report = outcome.tries(f"{way} report", lambda: make_report(small))
    if report is not None:
        outcome.looked_at = report.looked_at_fraction
        outcome.replaced[way], silent = shares(report, dense)
        if abs(silent) > 1e-9:
            outcome.steps[f"{way} report"] = f"silent: of {silent:.1%} of the block parameters nothing is said"
    outcome.tries(f"{way} save", lambda: small.save_pretrained(root / way / "model"))
    save_file(inputs, root / way / "given")
    if inputs:
        outputs = outcome.tries(f"{way} run", lambda: outputs_of(small, inputs, goes_on=False))
        if outputs is not None:
            if small.can_generate():
                outputs = outcome.tries("generate", lambda: outputs_of(small, inputs, goes_on=True)) or outputs
            save_file(outputs, root / way / "here")
    return small


def _check_stock(stock, folder):
    stock.save_pretrained(folder)
    loaded = load_dense(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in stock.state_dict().items())


def _prove(outcome, root, way, inputs):
    folder = root / way / "model"

    def verified():
        found = verify(folder)
        assert found.ok, found.message

    if inputs:
        rows = [{name: value[0] for name, value in batch.items()} for batch in batches_like(inputs)]
        outcome.tries("recover", lambda: recover(folder, teacher=root / "dense", dataset=rows, epochs=1))
    outcome.tries("verify", verified)
    outcome.tries("push", lambda: push_to_hub(folder, "me/model", dry_run=True))


def reloaded_(outcomes, root):
    """Load every saved folder in one process without this library, and note which compute the same there.

    Args:
        outcomes: Name of a folder in `root` -> outcome.
    """
    cases = {
        f"{name} {way}": [str(root / name / way), outcome.head, outcome.steps.get("generate") == DONE]
        for name, outcome in outcomes.items()
        for way in WAYS
        if (root / name / way / "model" / "config.json").is_file()
    }
    run_elsewhere(CHILD, root, cases=cases)
    for key, said in json.loads((root / "said.json").read_text()).items():
        name, way = key.split()
        folder = root / name / way
        if said == DONE and (folder / "here").is_file() and not _are_equal(folder / "here", folder / "there"):
            said = "differs: outputs without this library are others"
        outcomes[name].steps[f"{way} reload"] = said


def _are_equal(here, there):
    ours, theirs = load_file(here), load_file(there)
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.nan_to_num(), theirs[name].nan_to_num()) for name, value in ours.items()
    )
