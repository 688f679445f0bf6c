"""What every task is: data as steps, a score that grows step by step, and the driver that runs models over both."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_lowrank.data.batches import require_known_tokens
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.loading import require_tokenizer
from hf_lowrank.hosts.outputs import Batch, Said, run
from hf_lowrank.options import LARGEST_SEED, Options, option
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.configuration_lowrank import PREFIX

# Agreement with a dense model, by what is said; more is better.
AGREEMENTS = ("top1_agreement", "label_agreement", "pearson_to_dense", "cosine_to_dense")
_RESAMPLES, _LEVEL = 1000, 0.95


@dataclass(frozen=True)
class Step:
    """One batch, and what the model's answer to it is scored against."""

    inputs: Batch
    targets: Any


class Score(ABC):
    """What a model is scored by, kept example by example: one number of all, and how sure it is, come out of these."""

    def __init__(self) -> None:
        self._examples: list[torch.Tensor] = []

    @property
    def examples(self) -> torch.Tensor:
        """What the metric is made of, (N, K), a row an example, float64."""
        return torch.cat(self._examples).double()

    @abstractmethod
    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; `rows` are those of `hf_lowrank.hosts.outputs.run`."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """Name of each metric and its value."""

    @abstractmethod
    def metric(self, examples: torch.Tensor) -> float:
        """The task's metric of some of the examples, (N, K)."""

    def change(self, ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """How far the metric of a model is from that of another on the same examples."""
        return self.metric(ours) - self.metric(theirs)

    def interval(self, dense: "Score") -> dict[str, float]:
        """`change_low` and `change_high`: between them lies the change from dense in 95 of 100 draws of examples.

        The examples are drawn with replacement as many times as there are, the same for both models: the paired
        percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
        """
        ours, theirs = self.examples, dense.examples
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randint(len(ours), (len(ours),), generator=generator) for _ in range(_RESAMPLES)]
        changes = torch.tensor([self.change(ours[draw], theirs[draw]) for draw in draws])
        ends = changes.quantile(torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]))
        return dict(zip(("change_low", "change_high"), ends.tolist(), strict=True))


@dataclass(frozen=True)
class Task(Options, ABC):
    """A way to score a model; its fields are its options.

    Args:
        max_examples: Score on that many examples at most.
        seed: Of everything drawn.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # columns of the data
    metric: ClassVar[str]  # the one that counts, of those the score gives
    higher_is_better: ClassVar[bool]
    heads: ClassVar[Collection[str]]  # names of the dense classes that can do it; all where empty
    reads_text: ClassVar[bool] = True  # and nothing else

    max_examples: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)

    def steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        """The data in batches, as long as the model can take them.

        Args:
            examples: Whatever `hf_lowrank.data.rows.load_rows` reads.

        Raises:
            InputError: If the data or the tokenizer does not fit the task.
        """
        if tokenizer is None and self.reads_text:
            raise InputError("Text needs a tokenizer, and there is none. Give tokenizer=.")
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        steps = self._steps(tokenizer, examples, batch_size, model)
        require_known_tokens([step.inputs for step in steps], model, tokenizer)
        return steps

    @abstractmethod
    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]: ...

    @abstractmethod
    def score(self) -> Score:
        """A score that has seen nothing yet."""

    def prepare(self, model: Any) -> Any:
        """The part of a model that is run.

        Raises:
            InputError: If it has not the head the task needs.
        """
        name = type(model).__name__.removeprefix(PREFIX)
        if self.heads and name not in self.heads:
            raise InputError(f"Task {self.name} cannot use the head of {name}. Give a model with a head for it.")
        return model

    def evaluate(
        self, model: Any, tokenizer: Any, examples: Any, batch_size: int = 8, progress: Progress = no_progress
    ) -> dict[str, float]:
        """Score one model.

        Raises:
            InputError: If the model, the tokenizer or the data does not fit the task.
        """
        model = self.prepare(model)
        return self.compare({"model": model}, self.steps(tokenizer, examples, batch_size, model), progress)["model"]

    def compare(
        self, models: dict[str, Any], steps: Sequence[Step], progress: Progress = no_progress
    ) -> dict[str, dict[str, float]]:
        """Score models on the same data, all of them in each step; every later one is also compared with the first.

        Beside the task's metrics there are the number of `examples`, of later models also what `Agreement.result` and
        `Score.interval` give.
        """
        scores = {name: self.score() for name in models}
        agreements = {name: Agreement() for name in list(models)[1:]}
        was_training = {name: model.training for name, model in models.items()}
        try:
            for step in progress(steps, f"evaluating {self.name}"):
                said = {name: _run(model.eval(), step.inputs) for name, model in models.items()}
                first = next(iter(said.values()))
                for name, one in said.items():
                    scores[name].add(one.rows, step)
                for name, agreement in agreements.items():
                    agreement.add(said[name], first)
        finally:
            for name, model in models.items():
                model.train(was_training[name])
        dense = next(iter(scores.values()))
        return {
            name: score.result()
            | {"examples": float(len(score.examples))}
            | (agreements[name].result() | score.interval(dense) if name in agreements else {})
            for name, score in scores.items()
        }


class Agreement:
    """How alike the outputs of two models are, in words that suit what they say."""

    def __init__(self) -> None:
        self._kind = ""
        self._distance = 0.0
        self._same = 0.0
        self._count = 0
        self._numbers: list[torch.Tensor] = []  # (2, N V) each

    def add(self, said: Said, reference: Said) -> None:
        """Count one step.

        Raises:
            InputError: If the models do not speak of the same things.
        """
        if said.kind != reference.kind or said.rows.shape != reference.rows.shape:
            raise InputError("The model and the dense one have different heads or sizes. Give the one it came from.")
        self._kind = said.kind
        self._distance += float(said.distance(reference).double().sum())
        self._count += len(said.rows)
        if said.kind == "distribution":
            self._same += float((said.rows.argmax(dim=-1) == reference.rows.argmax(dim=-1)).sum())
        elif said.kind == "labels":
            self._same += float(((said.rows > 0) == (reference.rows > 0)).float().mean(dim=-1).sum())
        elif said.kind == "number":
            self._numbers.append(torch.stack([said.rows.flatten(), reference.rows.flatten()]).double())

    def result(self) -> dict[str, float]:
        """Means over everything said.

        Of classes and tokens `kl_from_dense` in nats and `top1_agreement`, of labels `kl_from_dense` and
        `label_agreement` (the share that is true, or false, of both), of numbers `rmse_from_dense` and
        `pearson_to_dense` (0 where one of them never varies), of embeddings `cosine_to_dense`.
        """
        mean = self._distance / self._count
        if self._kind == "embedding":
            return {"cosine_to_dense": 1 - mean}
        if self._kind == "number":
            numbers = torch.cat(self._numbers, dim=1)
            root = float((numbers[0] - numbers[1]).square().mean().sqrt())
            return {"rmse_from_dense": root, "pearson_to_dense": float(numbers.corrcoef()[0, 1].nan_to_num())}
        shared = "top1_agreement" if self._kind == "distribution" else "label_agreement"
        return {"kl_from_dense": mean, shared: self._same / self._count}


def metric_of(task: Task, scores: Collection[str]) -> str:
    """The task's metric, or where what models say has another measure of agreement, that."""
    return task.metric if task.metric in scores else next(name for name in AGREEMENTS if name in scores)


@torch.inference_mode()
def _run(model: Any, inputs: Batch) -> Said:
    said = run(model, {name: tensor.to(model.device) for name, tensor in inputs.items()})
    return Said(said.kind, said.rows.float().cpu())
