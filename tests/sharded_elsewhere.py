"""Every structure under FSDP2 in this process and a companion: how far it is from the whole model.

Run by test_training_processes.py as `sharded_elsewhere.py FOLDER` by a launcher; the first process writes
FOLDER/differences.json.
"""

import copy
import json
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from every_structure import OF_ANY_MODEL, build_every_structure, structures_with
from tiny_training import rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainings_elsewhere import small_model, sparse_model

from hf_lowrank import MixedRank
from hf_lowrank.training.callbacks.schedules import Span
from hf_lowrank.training.distillation import repeated_blocks
from hf_lowrank.training.features import PaddingCollator
from hf_lowrank.training.processes import end_as_first

HEADS = ("BertForMaskedLM", "GPT2LMHeadModel")
CASES = {f"{head} {name}": (head, name) for head, name in product(HEADS, OF_ANY_MODEL)}
MIXED = "mixed ranks"
STEPS = 3


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in repeated_blocks(model):
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def largest_difference(model, twin):
    """Of two state dicts, which have the same names."""
    ours, theirs = model.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    return max(float((ours[name].double() - whole(theirs[name]).double()).abs().max()) for name in ours)


def differences(model, twin, batch, prepare=lambda step: None):
    """The model trained on the batch, its sharded twin on a share of it: of outputs, gradients and parameters."""
    rank, share = dist.get_rank(), len(batch["input_ids"]) // dist.get_world_size()
    mine = {name: value[rank * share : (rank + 1) * share] for name, value in batch.items()}
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, twin)]
    found = []
    for step in range(STEPS):
        prepare(step)
        losses = [one(**data).loss for one, data in ((model, batch), (twin, mine))]
        for loss in losses:
            loss.backward()
        mean = losses[1].detach().clone()
        dist.all_reduce(mean)
        found.append(float((losses[0] - mean / dist.get_world_size()).abs()))
        gradients = [(one.grad, other.grad) for one, other in zip(model.parameters(), twin.parameters(), strict=True)]
        found.append(max(float((ours - whole(theirs)).abs().max()) for ours, theirs in gradients if ours is not None))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found.append(largest_difference(model, twin))
    with torch.no_grad():
        model.eval(), twin.eval()
        found += [float((model(**batch).logits - twin(**batch).logits).abs().max()) for _ in range(2)]
    return found


def of_structure(head, name):
    model = build_every_structure(head, structures_with(name))
    batch = PaddingCollator(0)(rows(4))
    batch["labels"] = batch["input_ids"]
    return differences(model, sharded_(copy.deepcopy(model)), batch)


def of_mixed_ranks():
    dense, mixed = sparse_model(), []
    models = [small_model(dense) for _ in range(2)]
    names = list(models[0].state_dict())
    for model in models:
        mixed.append(MixedRank(model.train(), dense, max_steps=STEPS, probability=1.0, span=Span(0, 2)))
    sharded_(models[1])

    def draw(step):
        for one in mixed:
            one.draw(step)

    found = differences(*models, PaddingCollator(0)(rows(4, labels="class")), draw)
    for one in mixed:
        one.finish()
    assert list(models[1].state_dict()) == names
    return [*found, largest_difference(*models)]


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: of_structure(*CASES[case]) for case in CASES}
    found[MIXED] = of_mixed_ranks()
    if end_as_first():
        (Path(folder) / "differences.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
