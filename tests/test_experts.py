"""Experts of mixtures: replaced, routed as the host routes, solved for on their tokens, counted as they run."""

import copy

import accelerate
import peft
import pytest
import torch
import transformers
from elsewhere import run_elsewhere
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import hf_lowrank
from hf_lowrank import PlanError, compress, decompress
from hf_lowrank.hosts.multiply_adds import count_multiply_adds
from hf_lowrank.hosts.outputs import run
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.matrix.data_aware_svd import WhitenedSVD
from hf_lowrank.methods.matrix.svd import SVD
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code.lowrank_experts import LowRankExperts
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.statistics.collection import collect_statistics

_TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
_LATENT = {
    "n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "num_key_value_heads": 2, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
# Class of the model -> what its configuration says besides: experts by rows or columns, with biases, beside others.
MIXTURES = {
    "MixtralForCausalLM": {"num_local_experts": 6},
    "Qwen3MoeForCausalLM": {"num_experts": 6},
    "OlmoeForCausalLM": {"num_experts": 6},
    "Qwen2MoeForCausalLM": {"num_experts": 6, "shared_expert_intermediate_size": 24},
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": {**_LATENT, "head_dim": 8},
    "GptOssForCausalLM": {"num_local_experts": 6},
    "GraniteMoeForCausalLM": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "Llama4ForCausalLM": {"num_local_experts": 6, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
}
WAYS = ("eager", "batched_mm", "grouped_mm")
IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
each_mixture = pytest.mark.parametrize("name", MIXTURES)

# Read by a Python that cannot import this library.
CHILD = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module

found = {}
for name, folder in jobs["folders"].items():
    load = get_class_from_dynamic_module(f"modeling_lowrank.LowRank{name}", folder).from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        found[name] = model.eval()(torch.tensor(jobs["ids"])).logits
torch.save(found, "found.pt")
for folder in jobs["damaged"]:
    try:
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        assert "do not fit its plan" in str(error)
    else:
        raise AssertionError(folder)
"""


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, use_cache=False, **more).logits


def goes_by(model, way):
    """The model, its experts going that way, if it knows several."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(way)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def dense(root):
    """Loaded from disk, as users load theirs."""
    found = {}
    for name, more in MIXTURES.items():
        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_class.config_class.model_type, **{**_TINY, **more})
        model_class(config).save_pretrained(root / f"dense-{name}")
        found[name] = model_class.from_pretrained(root / f"dense-{name}").eval()
    return found


@pytest.fixture(scope="module")
def small(dense):
    return {name: compress(model, method="svd", keep_targets=0.5) for name, model in dense.items()}


@pytest.fixture(scope="module")
def elsewhere(small, root):
    folders = {name: str(root / f"small-{name}") for name in small}
    for name, model in small.items():
        model.save_pretrained(folders[name])
    lost = root / "lost"
    small["MixtralForCausalLM"].save_pretrained(lost)
    weights = load_file(lost / "model.safetensors")
    del weights["model.layers.0.mlp.experts.gate_up_proj.down"]
    save_file(weights, lost / "model.safetensors", {"format": "pt"})
    run_elsewhere(CHILD, root, folders=folders, ids=IDS.tolist(), damaged=[str(lost)])
    return torch.load(root / "found.pt")


@each_mixture
def test_all_experts_are_replaced_within_the_budget(small, dense, name):
    report = make_report(small[name])
    experts = {n: p.numel() for n, p in dense[name].named_parameters() if p.dim() == 3}
    found = [module for module in report.modules if module.structure == "low_rank_experts"]

    blocks = sum(p.numel() for n, p in dense[name].named_parameters() if ".layers." in n and p.dim() > 1)
    replaced = sum(module.dense_parameters for module in report.modules if module.structure != "dense")

    assert report.kept_targets_fraction <= 0.5
    assert replaced >= 0.95 * blocks
    assert sum(module.dense_parameters for module in found) == sum(experts.values()) > 0
    assert sum(module.parameters for module in found) == sum(
        p.numel() for _, one in named_structures(small[name]) if type(one) is LowRankExperts for p in one.parameters()
    )


@each_mixture
def test_what_is_saved_computes_the_same_without_this_library(small, elsewhere, name):
    assert torch.equal(logits(small[name]), elsewhere[name])


@each_mixture
def test_at_full_rank_the_host_routes_as_it_did(dense, name):
    model = goes_by(copy.deepcopy(dense[name]).double(), "eager")  # the one way of the host that knows float64
    patterns = {matrix.name: min(matrix.shape) for matrix in find_matrices(model) if matrix.kind == "experts"}

    whole = compress(model, method="svd", target_modules=list(patterns), rank=1, rank_pattern=patterns)

    assert {type(one) for _, one in named_structures(whole)} == {LowRankExperts}
    assert torch.allclose(logits(whole), logits(model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@each_mixture
def test_each_way_of_the_host_gives_the_same_and_trains_every_factor(small, name, way):
    expected = logits(small[name])
    model = goes_by(copy.deepcopy(small[name]), way).train()

    assert torch.allclose(logits(model), expected, atol=1e-5)
    model(IDS, labels=IDS).loss.backward()

    factors = [p for _, one in named_structures(model) if type(one) is LowRankExperts for p in one.parameters()]
    assert all(p.grad is not None and bool(p.grad.any()) for p in factors)


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "GptOssForCausalLM"])  # counts its attention
def test_multiply_adds_are_those_of_the_experts_a_token_goes_to(small, dense, name):
    report = make_report(small[name])

    for model, said in ((dense[name], report.dense_multiply_adds), (small[name], report.multiply_adds)):
        model = goes_by(copy.deepcopy(model), "eager")
        with FlopCounterMode(display=False) as counter:
            logits(model, torch.tensor([[7]]))

        assert counter.get_total_flops() // 2 == count_multiply_adds(model) == said


@each_mixture
def test_what_is_decompressed_is_stock_and_computes_the_same(small, dense, root, name):
    stock = decompress(small[name])
    stock.save_pretrained(root / f"stock-{name}")
    loaded, info = type(dense[name]).from_pretrained(root / f"stock-{name}", output_loading_info=True)

    assert not any(info.values())
    assert stock.state_dict().keys() == dense[name].state_dict().keys()
    assert torch.allclose(logits(loaded.eval()), logits(small[name]), atol=1e-5)


def test_a_method_of_linear_layers_alone_says_so_of_the_experts(dense):
    report = make_report(compress(dense["MixtralForCausalLM"], method="tucker", keep_targets=0.5))

    notes = [module.note for module in report.modules if len(module.shape) == 3]

    assert notes == ["this method takes linear layers alone"] * 4


def padded(lengths=(16, 9)):
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(real, IDS, 0), "attention_mask": real.long()}


def routed(model, batch):
    """Of the experts of the last layer: what they are given, with no padding, and the experts each token goes to."""
    seen = []
    experts = next(m.experts for m in reversed(find_matrices(model)) if m.kind == "experts")
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    run(model, batch)
    hook.remove()
    real = batch["attention_mask"].bool().flatten()
    return seen[0][0][real].double(), seen[0][1][real]


def collected(model, batches, path, kinds=("input_moment", "output_moment", "fisher")):
    matrices = [matrix for matrix in find_matrices(model) if matrix.kind == "experts"]
    found = collect_statistics(model, matrices, batches, frozenset(kinds), path=path / "s", fingerprint="abc")
    return matrices, found


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "Llama4ForCausalLM"])
def test_each_expert_is_known_by_the_tokens_it_gets(dense, name, tmp_path):
    batches = [{"input_ids": torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(1))} for _ in "ab"]
    batches = [{**batch, "attention_mask": (batch["input_ids"] < 50).long()} for batch in batches]
    before = {key: value.clone() for key, value in dense[name].state_dict().items()}
    rows, chosen = map(torch.cat, zip(*(routed(dense[name], batch) for batch in batches), strict=True))

    matrices, found = collected(dense[name], batches, tmp_path)

    first = matrices[-2]
    enough = [part for index, part in enumerate(first.parts) if (chosen == index).sum() >= 32]
    assert enough
    for part in enough:
        own = rows[(chosen == part.index).any(dim=1)]
        known = found[part.name]
        assert known.num_tokens == len(own)
        assert torch.allclose(known.input_moment, own.T @ own / len(rows), rtol=1e-4, atol=1e-7)
        assert known.output_moment.shape == (first.shape[0], first.shape[0])
        assert known.fisher.shape == first.shape
    assert list(before) == list(dense[name].state_dict())
    assert all(torch.equal(value, before[key]) for key, value in dense[name].state_dict().items())


@each_mixture
def test_experts_with_few_tokens_take_the_statistics_of_all_and_are_counted(dense, name, tmp_path):
    matrices, found = collected(dense[name], [padded()], tmp_path)

    few = [part for part in matrices[-1].parts if found.count(part.name) < part.shape[1]]
    together = {found[part.name].num_tokens for part in few}
    shares = [found[part.name].input_moment / max(found.count(part.name), 1) for part in few]

    assert few
    assert together == {sum(found.count(part.name) for part in matrices[-1].parts)}
    assert all(torch.allclose(share, shares[0]) for share in shares)


def test_the_report_says_which_experts_saw_few_tokens(dense):
    batches = [{"input_ids": IDS}, {"input_ids": IDS.flip(0)}]
    small = compress(dense["MixtralForCausalLM"], keep_targets=0.5, fast=True, calibration=batches)

    notes = [module.note for module in make_report(small).modules if module.structure == "low_rank_experts"]

    assert notes == ["6 of 6 experts saw too few tokens: solved for by what all saw"] * len(notes)


@each_mixture
def test_text_lowers_the_error_on_what_each_expert_is_given(dense, name, tmp_path):
    batch = {"input_ids": torch.randint(3, 60, (16, 16), generator=torch.Generator().manual_seed(2))}
    matrices, found = collected(dense[name], [batch], tmp_path, ("input_moment",))

    for matrix in matrices:
        for part in matrix.parts:
            if found.count(part.name) < part.shape[1]:
                continue
            known = found[part.name]
            errors = []
            for solver in (WhitenedSVD(), SVD()):
                change = part.weight - solver.decompose(part.weight, known).factors(5).product
                errors.append(float((change.double() @ known.input_moment * change).sum()))
            assert errors[0] < errors[1]


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "Llama4ForCausalLM"])  # nor is it while dense
def test_experts_move_and_copy_and_are_offloaded_as_any_module(small, name):
    expected = logits(small[name])
    moved = copy.deepcopy(small[name]).to(torch.float64).to(torch.float32)
    offloaded = accelerate.cpu_offload(copy.deepcopy(small[name]), execution_device=torch.device("cpu"))

    assert torch.equal(logits(moved), expected)
    assert torch.equal(logits(offloaded), expected)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT's own, for dense experts
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_go_to_linear_layers_and_experts_are_refused_by_name(small):
    model = small["MixtralForCausalLM"]

    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear"))

    assert torch.equal(logits(adapted), logits(model))
    with pytest.raises(ValueError, match="LowRankExperts"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["gate_up_proj"]))


def test_weights_of_experts_that_do_not_fit_are_neither_saved_nor_loaded(small, root, elsewhere, tmp_path):
    state = small["MixtralForCausalLM"].state_dict()
    del state["model.layers.0.mlp.experts.gate_up_proj.down"]

    with pytest.raises(PlanError, match="The weights to be saved do not fit its plan"):
        small["MixtralForCausalLM"].save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(PlanError, match="do not fit its plan"):
        hf_lowrank.LowRankMixtralForCausalLM.from_pretrained(root / "lost")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.MixtralForCausalLM.from_pretrained(root / "small-MixtralForCausalLM")


def test_a_host_that_computes_otherwise_with_its_experts_is_told(small):
    experts = small["MixtralForCausalLM"].model.layers[0].mlp.experts.gate_up_proj

    assert F.linear(torch.ones(3, 32), experts[1]).shape == (3, 96)
    assert (torch.ones(3, 96) @ copy.deepcopy(experts).half()[1].float()).dtype == torch.float32
    with pytest.raises(PlanError, match="exclude_modules"):
        torch.einsum("ti,oi->to", torch.ones(3, 32), experts[1])
