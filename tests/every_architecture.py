"""One architecture through the whole path, as a user goes it: built tiny, saved, loaded, compressed, saved, reloaded.

An outcome of a step is `done`, `refused: one line`, `crash: ...`, or what is wrong with the result.
"""

import warnings
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from elsewhere import run_elsewhere
from safetensors.torch import load_file, save_file
from shrunk import build_shrunk, head_of

from hf_lowrank import InputError, PlanError, compress, decompress, make_report, push_to_hub, recover
from hf_lowrank.hosts.dummy_inputs import dummy_inputs, run_quietly
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.sharing.verification import verify
from hf_lowrank.sharing.verification_child import tensors_of

DONE = "done"
_BATCHES = 6

# What is compressed by: the name of a step -> options, and whether it is given inputs.
WAYS = {
    "svd": ({"method": "svd"}, False),
    "synthetic": ({}, False),
    "inputs": ({}, True),
}

CHILD = """
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

def tensors_of(output):
    found = {}
    for name, value in output.items():
        for index, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if hasattr(part, "detach"):
                found[f"{name}.{index}"] = part.detach().clone().contiguous()
    return found

said = {}
for key, (folder, head, inputs, outputs) in jobs["cases"].items():
    try:
        load = get_class_from_dynamic_module(f"modeling_lowrank.LowRank{head}", folder).from_pretrained
        model, info = load(folder, output_loading_info=True)
        left = {name: sorted(map(str, keys))[:2] for name, keys in info.items() if keys}
        assert not left, left
        model.eval()
        for weight in (*model.parameters(), *model.buffers()):
            weight.data = weight.data.clone()
        given = load_file(inputs)
        if given:
            with torch.no_grad():
                torch.manual_seed(0)
                save_file(tensors_of(model(**given)), outputs)
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
            one_line = "\n" not in str(error).strip()
            self.steps[step] = f"refused: {error}" if one_line else f"crash: several lines: {error}"
            return None
        except Exception as error:
            self.steps[step] = f"crash: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return None
        self.steps[step] = DONE
        return found


def batches_like(inputs):
    """Ready batches of other values than those."""
    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(_BATCHES):
        batch = {}
        for name, value in inputs.items():
            if value.is_floating_point():
                batch[name] = torch.randn(value.shape, generator=generator).to(value)
            elif name == "attention_mask":
                batch[name] = value
            else:
                order = torch.randperm(value.shape[-1] - 1, generator=generator)
                batch[name] = torch.cat([value[..., :-1][..., order], value[..., -1:]], dim=-1)
        batches.append(batch)
    return batches


def block_parameters(model):
    """Parameters of two and more dimensions inside the blocks, counted once."""
    names = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    return sum(p.numel() for name, p in names if any(part.isdigit() for part in name.split(".")))


def share_replaced(report, dense):
    """Of the block parameters, how much is replaced, and how much no row of the report speaks of."""
    whole = block_parameters(dense)
    in_blocks = [m for m in report.modules if any(part.isdigit() for part in m.name.split("."))]
    gone = sum(m.dense_parameters for m in in_blocks if m.structure != "dense")
    said = sum(m.dense_parameters for m in in_blocks)
    return (gone / whole, (whole - said) / whole) if whole else (0.0, 0.0)


def compressed(outcome, folder, root, way, inputs):
    """The model compressed in one way, saved; None where that fails."""
    options, has_inputs = WAYS[way]
    calibration = batches_like(inputs) if has_inputs else None
    small = outcome.tries(
        f"{way} compress", lambda: compress(folder, keep_targets=0.5, calibration=calibration, **options)
    )
    if small is None:
        return None
    report = outcome.tries(f"{way} report", lambda: make_report(small))
    if report is not None:
        outcome.replaced[way], unsaid = share_replaced(report, load_dense(folder))
        if unsaid > 1e-9:
            outcome.steps[f"{way} report"] = f"silent: nothing is said of {unsaid:.1%} of the block parameters"
    outcome.tries(f"{way} save", lambda: small.save_pretrained(root / way / "model"))
    if inputs:
        said = outcome.tries(f"{way} run", lambda: outputs_of(small, inputs))
        if said is not None:
            save_file(said, root / f"{way}.here")
    return small


def outputs_of(model, inputs):
    """Every tensor that a model returns, by its place."""
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(model.eval()(**inputs))


def generated(model, inputs):
    """Tokens that a model goes on with."""
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def try_architecture(model_type, root, ways=tuple(WAYS), beyond=True):
    """Go the path up to what another process has to do; see `reloaded_`.

    Args:
        beyond: Whether to go on with generation, recovery, decompression, proof and publication.
    """
    outcome = Outcome(model_type, head_of(model_type))
    dense_folder = root / "dense"

    def build():
        dense = build_shrunk(model_type)
        dense.save_pretrained(dense_folder)
        return load_dense(dense_folder)

    dense = outcome.tries("build", build)
    if dense is None:
        return outcome
    inputs = outcome.tries("inputs", lambda: dummy_inputs(dense)) or {}
    root.mkdir(parents=True, exist_ok=True)
    save_file(inputs, root / "given")
    for way in ways:
        if way == "inputs" and not inputs:
            continue
        small = compressed(outcome, dense_folder, root, way, inputs)
        if small is not None and beyond and way == "svd":
            _go_on(outcome, small, dense_folder, root / way, inputs)
    return outcome


def _go_on(outcome, small, dense_folder, root, inputs):
    if inputs and small.can_generate():
        outcome.tries("generate", lambda: generated(small, {k: v for k, v in inputs.items() if "decoder" not in k}))
    stock = outcome.tries("decompress", lambda: decompress(small))
    if stock is not None:
        outcome.tries("decompressed", lambda: _loads_again(stock, root / "stock", inputs))
    if inputs:
        rows = [{name: value[0] for name, value in batch.items()} for batch in batches_like(inputs)]
        healing = partial(recover, root / "model", teacher=dense_folder, dataset=rows, epochs=1)
        outcome.tries("recover", healing)


def _loads_again(stock, folder, inputs):
    stock.save_pretrained(folder)
    again = load_dense(folder)
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in again.state_dict().items())
    if inputs:
        run_quietly(again, inputs)


def reloaded_(outcomes, root):
    """Load every saved folder in one process without this library, and note which compute the same there."""
    cases = {}
    for name, outcome in outcomes.items():
        for way in WAYS:
            folder = root / name / way / "model"
            if (folder / "config.json").is_file():
                here = root / name / f"{way}.here"
                given = root / name / "given"
                cases[f"{name} {way}"] = [
                    str(folder), outcome.head, str(given), str(here.with_suffix(".there")),
                ]  # fmt: skip
    run_elsewhere(CHILD, root, cases=cases)
    import json

    for key, said in json.loads((root / "said.json").read_text()).items():
        name, way = key.split(" ")
        if said == DONE and (root / name / f"{way}.here").is_file():
            first, second = (load_file(root / name / f"{way}.{end}") for end in ("here", "there"))
            equal = first.keys() == second.keys() and all(
                torch.equal(v.nan_to_num(7.5), second[k].nan_to_num(7.5)) for k, v in first.items()
            )
            said = DONE if equal else "differs: outputs without this library are others"
        outcomes[name].steps[f"{way} reload"] = said


def proved_(outcome, root):
    """Verify the folder of the plain SVD, and say what would be pushed."""
    folder = root / "svd" / "model"
    if not (folder / "config.json").is_file():
        return

    def verified():
        found = verify(folder)
        if not found.ok:
            raise AssertionError(found.message)

    outcome.tries("verify", verified)
    outcome.tries("push", lambda: push_to_hub(folder, "me/model", dry_run=True))


def as_row(outcome):
    """For JSON."""
    return asdict(outcome)
