"""Smaller, faster transformers models by low-rank compression, which load anywhere without this library.

    from hf_lowrank import compress

    small = compress("my-fine-tuned-bert", keep_params=0.6)
    small.save_pretrained("small-bert")

    # elsewhere, this library not installed:
    AutoModel.from_pretrained("small-bert", trust_remote_code=True)

Importing this package imports neither torch nor the rest of it; it only has the compressed families registered with
the auto classes when those are loaded, so that here no flag is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_lowrank.errors import InputError as InputError
from hf_lowrank.registration import register_lazily
from hf_lowrank.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_lowrank.compression.compress import compress as compress
    from hf_lowrank.compression.compress import decompress as decompress
    from hf_lowrank.compression.conversion import convert_storage_ as convert_storage_
    from hf_lowrank.compression.vocabulary import reduce_vocabulary as reduce_vocabulary
    from hf_lowrank.evaluation.evaluation import evaluate as evaluate
    from hf_lowrank.methods.table import register_method as register_method
    from hf_lowrank.records.report import make_report as make_report
    from hf_lowrank.remote_code.lowrank_plan import PlanError as PlanError
    from hf_lowrank.runtimes.export import export as export
    from hf_lowrank.sharing.cards.callback import CardCallback as CardCallback
    from hf_lowrank.sharing.hub import push_to_hub as push_to_hub
    from hf_lowrank.sharing.inspection import saved_report as saved_report
    from hf_lowrank.sharing.recorded_evaluation import record_evaluation as record_evaluation
    from hf_lowrank.studies.analysis import analyze as analyze
    from hf_lowrank.studies.comparison import compare as compare
    from hf_lowrank.training.callbacks.mixed_rank import MixedRank as MixedRank
    from hf_lowrank.training.callbacks.mixed_rank import MixedRankCallback as MixedRankCallback
    from hf_lowrank.training.callbacks.pruning import FirstOrderPruningCallback as FirstOrderPruningCallback
    from hf_lowrank.training.callbacks.rank_schedule import RankScheduleCallback as RankScheduleCallback
    from hf_lowrank.training.callbacks.rank_schedule import StableRankPenaltyCallback as StableRankPenaltyCallback
    from hf_lowrank.training.distillation import DistillationTrainer as DistillationTrainer
    from hf_lowrank.training.lpaf import lpaf as lpaf
    from hf_lowrank.training.recovery import recover as recover

# public name -> module that defines it; imported when first asked for
_HOMES = {
    "CardCallback": "hf_lowrank.sharing.cards.callback",
    "PlanError": "hf_lowrank.remote_code.lowrank_plan",
    "DistillationTrainer": "hf_lowrank.training.distillation",
    "analyze": "hf_lowrank.studies.analysis",
    "compare": "hf_lowrank.studies.comparison",
    "compress": "hf_lowrank.compression.compress",
    "convert_storage_": "hf_lowrank.compression.conversion",
    "decompress": "hf_lowrank.compression.compress",
    "export": "hf_lowrank.runtimes.export",
    "evaluate": "hf_lowrank.evaluation.evaluation",
    "make_report": "hf_lowrank.records.report",
    "FirstOrderPruningCallback": "hf_lowrank.training.callbacks.pruning",
    "MixedRank": "hf_lowrank.training.callbacks.mixed_rank",
    "MixedRankCallback": "hf_lowrank.training.callbacks.mixed_rank",
    "RankScheduleCallback": "hf_lowrank.training.callbacks.rank_schedule",
    "StableRankPenaltyCallback": "hf_lowrank.training.callbacks.rank_schedule",
    "lpaf": "hf_lowrank.training.lpaf",
    "recover": "hf_lowrank.training.recovery",
    "reduce_vocabulary": "hf_lowrank.compression.vocabulary",
    "push_to_hub": "hf_lowrank.sharing.hub",
    "register_method": "hf_lowrank.methods.table",
    "record_evaluation": "hf_lowrank.sharing.recorded_evaluation",
    "saved_report": "hf_lowrank.sharing.inspection",
}

__all__ = ["InputError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name.startswith("LowRank"):
        home = "configuration_lowrank" if name.endswith("Config") else "modeling_lowrank"
        return getattr(importlib.import_module(f"hf_lowrank.remote_code.{home}"), name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_lazily()
