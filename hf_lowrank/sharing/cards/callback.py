"""Training that writes itself down: the card of each checkpoint says what was trained, how long, and its scores."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import InputError
from hf_lowrank.files.redaction import without_tokens_inside
from hf_lowrank.options import checked
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code.lowrank_model import LowRankMixin
from hf_lowrank.sharing.record import write_record


class CardCallback(TrainerCallback):
    """Keeps the record of a training run in a compressed model, and writes report and card into each checkpoint.

    `Trainer(..., callbacks=[CardCallback("stanfordnlp/sst2")])`. The record is in the model's configuration, so that
    whatever is saved or pushed later has it; what was evaluated before is not claimed of the trained weights.

    Args:
        dataset: What is trained on: a Hub id, or a name.
    """

    @checked
    def __init__(self, dataset: str | None = None) -> None:
        self.dataset = dataset
        self._earlier: list[dict[str, Any]] = []
        self._scores: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._earlier = list(_provenance(kwargs["model"]).get("training", []))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scores = {name: value for name, value in kwargs["metrics"].items() if isinstance(value, (int, float))}
        timing = ("_runtime", "_per_second", "epoch")
        self._scores = {name: float(value) for name, value in scores.items() if not name.endswith(timing)}
        self._note(args, state, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._note(args, state, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._note(args, state, kwargs["model"])
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_record(folder, make_report(_unwrapped(kwargs["model"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._note(args, state, kwargs["model"])

    def _note(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        run = {
            "dataset": self.dataset,
            "steps": state.global_step,
            "epochs": None if state.epoch is None else round(state.epoch, 2),
            "learning_rate": args.learning_rate,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "training_loss": losses[-1] if losses else None,
            **self._scores,
        }
        known = {name: without_tokens_inside(value) for name, value in run.items() if value is not None}
        _provenance(model)["training"] = [*self._earlier, known]


def _unwrapped(model: Any) -> Any:
    """The compressed model inside what parallel training wraps around it."""
    while not isinstance(model, LowRankMixin) and hasattr(model, "module"):
        model = model.module
    if not isinstance(model, LowRankMixin):
        raise InputError(f"CardCallback keeps the record of a compressed model, got {type(model).__name__}.")
    return model


def _provenance(model: Any) -> dict[str, Any]:
    plan = _unwrapped(model).config.compression
    found: dict[str, Any] = plan.setdefault("provenance", {})
    return found
