"""Decomposing the matrices of a model with one solver: the text it looks at, the statistics, the measurements."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from hf_lowrank.batches import fingerprint
from hf_lowrank.calibration import Calibration, described_text, make_calibration
from hf_lowrank.checkpoint import NOT_KEPT, Checkpoint, weights_digest
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.curves import measured_errors, predicted_errors, probe_rank, spectral_errors
from hf_lowrank.planning.plans import candidate_matrices
from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.planning.probes import Changes, Probe
from hf_lowrank.progress import Progress
from hf_lowrank.remote_code.lowrank_plan import Spec, sizes_of
from hf_lowrank.scratch import scratch_folder, write_text
from hf_lowrank.settings import CompressionSettings
from hf_lowrank.solvers import SOLVERS
from hf_lowrank.solvers.factors import BandedSolution, Factors
from hf_lowrank.solvers.metric import Metric
from hf_lowrank.solvers.nonlinear_autoencoder import NonlinearCodes
from hf_lowrank.solvers.stored import StoredDecomposition, store_decomposition
from hf_lowrank.solvers.svd import Decomposition, Truncations
from hf_lowrank.solvers.token_tables import TokenTable, make_table
from hf_lowrank.statistics.collection import collect_statistics
from hf_lowrank.statistics.moments import MatrixStatistics, Statistics
from hf_lowrank.statistics.token_counts import count_tokens
from hf_lowrank.targets import DenseMatrix, JointMatrix, Matrix, joint_matrices
from hf_lowrank.version import __version__

# Where errors come from -> what makes them from singular values alone; `analyze` asks for them of any allocation.
_ERRORS = {"none": spectral_errors, "spectra": spectral_errors, "curvature": predicted_errors}


class Decomposer:
    """Applies one solver to the matrices of one dense model.

    Nothing is read, run or computed before it is asked for, and nothing twice: with `settings.cache_dir`, not even in
    a later run on the same model and text. What is found is kept on disk, in that folder or in one that goes when this
    does, and read a matrix at a time.

    Args:
        source: Calibration text, or None for synthetic tokens; see `make_calibration`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: CompressionSettings,
        source: Any,
        tokenizer: Any,
        progress: Progress,
    ) -> None:
        self._model = model
        self.settings = settings
        self._source = source
        self._tokenizer = tokenizer
        self.progress = progress
        self._solver = SOLVERS.get(settings.method, SOLVERS["svd"])  # which a tensor method does not ask for
        self._measures = ALLOCATIONS[settings.chosen_allocation].errors == "probes"
        self._tables: dict[str, TokenTable] = {}

    def __call__(self, matrix: Matrix) -> Truncations:
        """The decomposition of one matrix."""
        stored = self._stored(matrix)
        found: Truncations = stored if stored.path.is_file() else self._decompose(matrix)
        if not self._solver.fits_each_rank or isinstance(matrix, JointMatrix):
            return found
        weight = matrix.weight.to(self.settings.device or matrix.weight.device)
        return self._solver.fitted(found, weight, self.known(matrix, weight.device))

    def sizes(self, matrix: Matrix, rank: int) -> dict[str, int]:
        """What a spec says of a matrix of that rank; for an autoencoder, the best sizes that cost as much."""
        if not self.autoencodes(matrix):
            return {"rank": rank}
        return self._table(matrix).sizes(rank, (self.settings.torch_dtype or self._model.dtype).itemsize)

    def solution(self, matrix: Matrix, spec: Spec) -> Factors | BandedSolution | NonlinearCodes:
        """The numbers of a structure of those sizes; see `ENCODERS`."""
        if not self.autoencodes(matrix):
            return self(matrix).factors(spec["rank"])
        return self._table(matrix).at_sizes(sizes_of(spec))

    def autoencodes(self, matrix: Matrix) -> bool:
        """Whether codes and a decoder take the place of a matrix."""
        return self.settings.embeddings == "autoencoder" and matrix.role in ("embedding", "head")

    def output_metric(self, matrix: DenseMatrix) -> Metric:
        """What the solver holds errors at the outputs of one matrix to cost; it is where the matrix is."""
        return self._solver.metrics(self.known(matrix, matrix.weight.device))[0]

    def bias(self, matrix: DenseMatrix, factors: Factors) -> torch.Tensor | None:
        """The bias that goes with the factors of a matrix: its own, or the one with the least error beside them.

        `E||W x + b - W' x - b'||^2` is least, whatever `W'`, at `b' = b + (W - W') E[x]`.
        """
        own: Any = getattr(matrix.module, "bias", None)
        if own is None:
            return None
        bias: torch.Tensor = own.detach().clone()
        known = self.known(matrix, bias.device) if self.settings.bias_correction else None
        if known is None or known.input_mean is None:
            return bias
        mean = known.input_mean
        product = factors.up.to(mean) @ (factors.down.to(mean) @ mean)
        return (bias + (matrix.weight.to(mean) @ mean - product)).to(bias.dtype)

    def joint(self, matrices: Sequence[DenseMatrix]) -> list[JointMatrix]:
        """Those that were seen to read the same input, together; none where the method looks at no inputs."""
        return [] if self._statistics is None else joint_matrices(matrices, self._statistics.inputs)

    def errors(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        """Loss of each matrix at rank 1, 2, ..., as the allocation wants it."""
        spectra = self._spectra(matrices)
        if not self._measures:
            errors_of = _ERRORS[ALLOCATIONS[self.settings.chosen_allocation].errors]
            return {name: errors_of(values) for name, values in spectra.items()}
        for matrix in self.progress(matrices, "measuring ranks"):
            self._measure(matrix)
        return {m.name: measured_errors(spectra[m.name], probe_rank(m), self._measured[m.name]) for m in matrices}

    def predicted(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        """Loss of each matrix at rank 1, 2, ..., in the solver's own metric."""
        return {name: predicted_errors(values) for name, values in self._spectra(matrices).items()}

    def _spectra(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        self._store(matrices)
        return {matrix.name: self._singular_values(matrix) for matrix in matrices}

    def _singular_values(self, matrix: Matrix) -> FloatArray:
        """In the solver's metric; those of an autoencoder are such that what they leave out is its error."""
        values: FloatArray = self._stored(matrix).singular_values.numpy()
        if not self.autoencodes(matrix):
            return values
        left = np.sum(values**2) * self._table(matrix).errors
        saved = np.append(np.sum(values**2), left[:-1]) - left
        return np.sqrt(np.maximum(saved, 0.0))

    def damage(self, matrices: Sequence[Matrix], ranks: dict[str, int]) -> float:
        """What the whole model loses at these ranks; matrices without one stay dense."""
        replaced = [matrix for matrix in matrices if matrix.name in ranks]
        self._store(replaced)
        return self._probe.damage({k: v for m in replaced for k, v in self._changes(m, ranks[m.name]).items()})

    def described_text(self) -> dict[str, Any] | None:
        """What the model was watched on, for the record; None if it was not."""
        if not self.settings.looks_at_text:
            return None
        return described_text(self._source, [*self.calibration.batches, *self.calibration.probes])

    def _decompose(self, matrix: Matrix) -> Decomposition:
        weights = [member.weight.to(self.settings.device or member.weight.device) for member in matrix.members]
        known = [self.known(member, weights[0].device) for member in matrix.members]
        if isinstance(matrix, JointMatrix):
            return self._solver.decompose_jointly(weights, known)
        return self._solver.decompose(weights[0], known[0])

    def known(self, matrix: DenseMatrix, device: torch.device) -> MatrixStatistics | None:
        """What the text says about one matrix; None where the method looks at none."""
        known = self._statistics.get(matrix.name) if self._statistics is not None else None
        return None if known is None else known.to(device)

    def _store(self, matrices: Sequence[Matrix]) -> None:
        """Decompose those that will be asked for again: to measure, to compare plans, to replace."""
        unknown = [matrix for matrix in matrices if not self._stored(matrix).path.is_file()]
        for matrix in self.progress(unknown, "decomposing") if unknown else []:
            store_decomposition(self._decompose(matrix), self._stored(matrix).path)

    def _stored(self, matrix: Matrix) -> StoredDecomposition:
        identity = self._identity if self.settings.needs else self._model_identity
        path = self._folder / f"decompositions-{self.settings.method}-{identity}" / f"{matrix.name}.safetensors"
        return StoredDecomposition(path, torch.device(self.settings.device or matrix.members[0].weight.device))

    def _changes(self, matrix: Matrix, rank: int) -> Changes:
        """What the weights become at that rank, each to be made when it is needed."""
        ends = list(itertools.accumulate(member.shape[0] for member in matrix.members))
        rows = [slice(end - member.shape[0], end) for end, member in zip(ends, matrix.members, strict=True)]
        return {
            m: partial(self._approximation, matrix, rank, part) for m, part in zip(matrix.members, rows, strict=True)
        }

    def _approximation(self, matrix: Matrix, rank: int, rows: slice) -> torch.Tensor:
        if self.autoencodes(matrix):
            return self._table(matrix).at_rank(rank).product[rows]
        factors = self(matrix).factors(rank)
        return factors.up[rows] @ factors.down

    def _table(self, matrix: Matrix) -> TokenTable:
        if matrix.name not in self._tables:
            weight = matrix.weight.to(self.settings.device or matrix.weight.device)
            known, objective = self.known(matrix.members[0], weight.device), self.settings.embedding_objective
            kept = self.checkpoint().part(matrix.name)
            self._tables[matrix.name] = make_table(
                weight, known, self._token_counts, objective, kept, self.settings.seed, self.progress
            )
        return self._tables[matrix.name]

    def _measure(self, matrix: Matrix) -> None:
        if matrix.name in self._measured:
            return
        self._measured[matrix.name] = self._probe.damage(self._changes(matrix, probe_rank(matrix)))
        write_text(self._measured_file, json.dumps(self._measured))

    @cached_property
    def _measured(self) -> dict[str, float]:
        """Damage of each matrix at its probe rank, by name, as far as it is known."""
        file = self._measured_file
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def _measured_file(self) -> Path:
        return self._folder / f"ranks-{self.settings.method}-{self._identity}.json"

    @cached_property
    def _matrices(self) -> list[DenseMatrix]:
        return candidate_matrices(self._model, self.settings)

    @cached_property
    def _token_counts(self) -> torch.Tensor | None:
        """How often tokens occur in the whole text; None where there is none, or no tokenizer."""
        embedding: Any = self._model.get_input_embeddings()
        vocab_size = embedding.num_embeddings
        return count_tokens(self._source, self._tokenizer, vocab_size, self.settings.text_column, self.settings.seed)

    @property
    def _watched(self) -> list[DenseMatrix]:
        """Those that statistics are wanted of."""
        if (self.settings.tensor_method or self._solver).needs or self.settings.bias_correction:
            return self._matrices
        return [matrix for matrix in self._matrices if self.autoencodes(matrix)]

    @cached_property
    def calibration(self) -> Calibration:
        """The text the model is watched on."""
        return make_calibration(self._model, self._source, self._tokenizer, self.settings)

    @cached_property
    def _probe(self) -> Probe:
        return Probe(self._model, self._matrices, self.calibration.probes)

    @cached_property
    def _statistics(self) -> Statistics | None:
        kinds = self.settings.needs
        if not kinds:
            return None
        file = self._folder / f"statistics-{'-'.join(sorted(kinds))}-{self._identity}.safetensors"
        with FileLock(file.with_suffix(".lock")):  # two runs would add to the same sums
            if file.is_file():
                return Statistics.load(file)
            return collect_statistics(
                self._model,
                self._watched,
                self.calibration.batches,
                kinds,
                path=file,
                fingerprint=self._identity,
                seed=self.settings.seed,
                progress=self.progress,
            )

    def checkpoint(self, small: PreTrainedModel | None = None) -> Checkpoint:
        """Where a computation from `small` and the text, or from the dense weights alone, keeps what it has done."""
        if self.settings.cache_dir is None:
            return NOT_KEPT
        start = self._model_identity if small is None else f"{self._identity}-{weights_digest(small)}"
        return Checkpoint(self._folder / f"learned-{self.settings.method}-{start}-{self.settings.seed}")

    @cached_property
    def _folder(self) -> Path:
        """Where what is found is kept: the cache, or a folder that goes when this does."""
        if self.settings.cache_dir is None:
            return scratch_folder(self)
        folder = Path(self.settings.cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def _identity(self) -> str:
        """A short hash of the model, the text and the seed: all that statistics depend on."""
        text = fingerprint([*self.calibration.batches, *self.calibration.probes])
        return hashlib.sha256(f"{self._model_identity} {text} {self.settings.seed}".encode()).hexdigest()[:16]

    @cached_property
    def _model_identity(self) -> str:
        """A short hash of the weights and of which matrices are looked at."""
        names = [matrix.name for matrix in self._matrices]
        about = f"{__version__} {type(self._model).__name__} {names} {weights_digest(self._model)}"
        return hashlib.sha256(about.encode()).hexdigest()[:16]
