"""What a host model class gains when it is compressed: its plan installed, its factors drawn, its code saved along."""

import os
import re
from typing import Any

import torch
from torch import nn
from transformers.models.auto import modeling_auto

from .configuration_lowrank import PREFIX, LowRankConfigMixin, as_stock, stock_class
from .lowrank_code import save_code
from .lowrank_materialize import set_materialize_
from .lowrank_plan import Spec
from .lowrank_structures import (
    install_plan_,
    module_name,
    named_shared_parts,
    named_structures,
    retie_,
    structure_name,
)
from .lowrank_table import CODES, STRUCTURES
from .lowrank_weights import check_loaded, check_saved


def auto_classes(model_type: str) -> dict[str, str]:
    """Auto class name -> host model class name, for every head transformers knows of `model_type`."""
    found = {}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(getattr(auto_class, "_model_mapping", None), "_model_mapping", None)
        if mapping is not None and name.startswith("Auto") and model_type in mapping:
            host = mapping[model_type]
            found[name] = host if isinstance(host, str) else host[0]
    return found


def auto_map(config_class: Any) -> dict[str, str]:
    """The `auto_map` entry of `config.json`: every head of the architecture, not only the one that is saved."""
    heads = auto_classes(stock_class(config_class).model_type)
    entries = {name: f"modeling_lowrank.{PREFIX}{host}" for name, host in sorted(heads.items())}
    return {"AutoConfig": f"configuration_lowrank.{config_class.__name__}", **entries}


def _packing(config: Any) -> Any:
    """What handles the rounded weights of a plan; None where there are none."""
    packed = config.plan.get("packed")
    return None if packed is None else CODES[packed["code"]]


def _guard_name(plan: dict[str, Any]) -> str | None:
    """The name, relative to the base model, of a dense weight that is gone; None if none is."""
    if not (specs := plan["modules"]):
        return None
    name = min(specs)
    return name if STRUCTURES[specs[name]["structure"]].HOSTS == "experts" else f"{name}.weight"


class LowRankMixin:
    """Mixed in before a host model class; see `modeling_lowrank`."""

    def __init__(self: Any, config: LowRankConfigMixin, *args: Any, **kwargs: Any) -> None:
        own = vars(self)
        own["config_class"] = stock_class(type(self)).config_class  # some hosts ask whether `config` is one of those
        with as_stock(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the host's
        del own["config_class"]
        install_plan_(self, config.plan)
        set_materialize_(self, config.materialize)
        if (guard := _guard_name(config.plan)) is not None:
            ignored = self._keys_to_ignore_on_load_unexpected or []
            self._keys_to_ignore_on_load_unexpected = [*ignored, rf"(^|\.){re.escape(guard)}$"]
        super().post_init()
        if (packing := _packing(config)) is not None:
            packing.expect_(self)

    def post_init(self: Any) -> None:
        # The host calls this at the end of its `__init__` to initialize and tie what it has built: too early.
        pass

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in the host, but where the host would draw weights of the plan at random it raises `PlanError`."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if not getattr(model, "_hf_peft_config_loaded", False):  # then it is told of the adapter's weights
            check_loaded(model, info)
        if (packing := _packing(model.config)) is not None:
            packing.decode_(model, model.config.materialize)
        return (model, info) if output_loading_info else model

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The host looks for its own words in the file a class was made in, which for ours is none of its files.
        return bool(stock_class(cls)._can_set_experts_implementation())

    @torch.no_grad()
    def initialize_weights(self: Any) -> None:
        # The host would draw each factor with the deviation of a whole weight.
        std = getattr(self.config, "initializer_range", None) or 0.02
        structure: Any
        for _, structure in [*named_shared_parts(self), *named_structures(self)]:
            # A quantizer puts new parameters, without the host's mark, in the place of those that are loaded.
            is_loaded = any(getattr(p, "_is_hf_initialized", False) for p in structure.parameters())
            if not (is_loaded or getattr(self, "is_quantized", False)):
                structure.reset_parameters(std)
            for module in structure.modules():
                module._is_hf_initialized = True
        # Of code not its own the host skips modules that have no parameters, and some fill their children's buffers.
        own = vars(self)
        own["is_remote_code"] = own["is_custom_code"] = lambda: False
        super().initialize_weights()
        del own["is_remote_code"], own["is_custom_code"]

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save a folder that loads anywhere with `trust_remote_code=True`: weights, plan and the code they need.

        Among the weights is an empty tensor in the place of one that is gone. A stock class, which knows nothing of
        the plan, would draw that weight at random; it stops at the wrong shape instead.

        Raises:
            PlanError: If the weights are not those of the plan.
        """
        config = self.config
        config.auto_map = auto_map(type(config))
        is_main, guard = kwargs.get("is_main_process", True), _guard_name(config.plan)
        if is_main and not getattr(self, "_hf_peft_config_loaded", False):
            state = kwargs.pop("state_dict", None) or self.state_dict()
            if (packing := _packing(config)) is not None:
                state = packing.packed_state(self, state)
            if not getattr(self, "is_quantized", False):
                check_saved(self, state)
            if guard is not None:
                prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
                state = {**state, prefix + guard: torch.empty(0, dtype=self.dtype)}
            kwargs["state_dict"] = state
        # A host's other names on disk are turned into those here only for the host's own classes.
        super().save_pretrained(save_directory, **{**kwargs, "save_original_format": False})
        if is_main:
            save_code(config.plan, save_directory)

    def _adjust_bias(self: Any, output_embeddings: Any, input_embeddings: Any) -> None:
        # While a model is loaded, a rounded table is bytes: how many says nothing of the length of the bias.
        weight = getattr(output_embeddings, "weight", None)
        if weight is None or weight.dtype != torch.uint8:
            super()._adjust_bias(output_embeddings, input_embeddings)

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        guard = _guard_name(self.config.plan)
        for name in (f"{prefix}{guard}", f"{prefix}{self.base_model_prefix}.{guard}"):
            if name in state_dict and not state_dict[name].numel():
                del state_dict[name]  # torch's own copy of what it was given
        if (packing := _packing(self.config)) is not None:
            packing.decoded_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As in the host; a compressed table grows by rows that decode to its mean row."""
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not (structure_name(embedding) or (head is not None and structure_name(head))):
            super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            _refresh_second_bias_(self)
            return self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        multiple = pad_to_multiple_of or 1
        wanted = new_num_tokens if new_num_tokens is not None else self.config.get_text_config().vocab_size
        num_tokens = -(-wanted // multiple) * multiple
        if structure_name(embedding):
            embedding.resize_(num_tokens)
        else:
            self.set_input_embeddings(self._get_resized_embeddings(embedding, num_tokens, mean_resizing=mean_resizing))
        if head is not None and structure_name(head):
            head.resize_(num_tokens)
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, num_tokens, mean_resizing=mean_resizing))
        _resize_tied_bias_(self)
        _record_sizes_(self)
        self.config.get_text_config().vocab_size = num_tokens
        self.vocab_size = num_tokens
        retie_(self)
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.tie_weights()
        _refresh_second_bias_(self)
        return self.get_input_embeddings()


def _resize_tied_bias_(model: Any) -> None:
    """Give the parameter that a compressed head's bias is tied to what that has become."""
    head = model.get_output_embeddings()
    if head is None or not structure_name(head):
        return
    source = (model._tied_weights_keys or {}).get(f"{module_name(model, head)}.{head.BIAS}")
    if source is not None:
        parent, _, leaf = source.rpartition(".")
        setattr(model.get_submodule(parent), leaf, head.get_parameter(head.BIAS))


def _record_sizes_(model: Any) -> None:
    """Bring the plan up to date where resizing changed more than the number of tokens."""
    plan, embedding, head = model.config.plan, model.get_input_embeddings(), model.get_output_embeddings()
    name = module_name(model.base_model, embedding)
    if name in plan["modules"]:
        plan["modules"][name] = _with_sizes(plan["modules"][name], embedding)
    if plan.get("output_embeddings") is not None:
        plan["output_embeddings"] = _with_sizes(plan["output_embeddings"], head)


def _with_sizes(spec: Spec, structure: Any) -> Spec:
    sizes = getattr(structure, "sizes", None)
    return spec if sizes is None else {"structure": spec["structure"], **sizes}


def _refresh_second_bias_(model: Any) -> None:
    # BERT and its like keep a bias beside an untied head that has one: unused, but saved, and built anew at the length
    # of the vocabulary. It must be of that length, and not the same tensor, which would be saved under one name only.
    head = model.get_output_embeddings()
    name = module_name(model, head)
    if name is None or getattr(model.config, "tie_word_embeddings", False):
        return
    parent = model.get_submodule(name.rpartition(".")[0])
    used = dict(head.named_parameters()).get(head.BIAS if structure_name(head) else "bias")
    if used is not None and isinstance(getattr(parent, "bias", None), nn.Parameter):
        parent.bias = nn.Parameter(used.detach().clone(), parent.bias.requires_grad)
