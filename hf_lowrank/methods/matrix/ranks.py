"""What ranks cost in quality: predicted from singular values, or measured on the model."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_lowrank.files.scratch import write_text
from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix, Matrix
from hf_lowrank.hosts.targets import joint_matrices
from hf_lowrank.methods.matrix.decompositions import Decompositions
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.tables.token_tables import is_token_table, token_table
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.curves import measured_errors, predicted_errors, probe_rank, spectral_errors
from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.remote_code.lowrank_plan import Spec, sizes_of
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

# Where errors come from -> what makes them from singular values alone; `analyze` asks for them of any allocation.
_ERRORS = {"none": spectral_errors, "spectra": spectral_errors, "curvature": predicted_errors}


class RankErrors:
    """Tells what ranks of the matrices of a problem cost in quality."""

    def __init__(self, problem: Problem, decompositions: Decompositions) -> None:
        self._problem = problem
        self._decompositions = decompositions

    def spec(self, matrix: Matrix, rank: int, itemsize: int | None = None) -> Spec:
        """That of a matrix of a rank; of an autoencoder, with the best sizes that cost as much.

        Args:
            itemsize: Bytes of a stored number, to pay for the order of the rows of a table as well.
        """
        problem = self._problem
        if isinstance(matrix, JointMatrix):
            return {"structure": "shared_down", "rank": rank}
        sizes = {"rank": rank}
        if problem.storage.autoencodes(matrix):
            sizes = token_table(problem, matrix).sizes(rank, itemsize)
        return {"structure": problem.storage.structure(matrix), **sizes}

    def rank(self, matrix: Matrix, spec: Spec) -> int:
        """The rank a matrix has by its spec; of an autoencoder, that of a linear one in as many numbers."""
        if not is_token_table(spec):
            return int(spec["rank"])
        numbers: int = STRUCTURES[spec["structure"]].num_weights(*matrix.shape, **sizes_of(spec))
        return min(max(1, numbers // sum(matrix.shape)), *matrix.shape)

    def joint(self, matrices: Sequence[DenseMatrix]) -> list[JointMatrix]:
        """Those that were seen to read the same input, together; none where the method looks at no inputs."""
        inputs = self._problem.evidence.inputs
        return [] if inputs is None else joint_matrices(matrices, inputs)

    def predicted(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        """Loss of each matrix at rank 1, 2, ..., in the solver's own metric."""
        return {name: predicted_errors(values) for name, values in self._spectra(matrices).items()}

    def errors(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        """Loss of each matrix at rank 1, 2, ..., as the allocation wants it."""
        spectra, source = self._spectra(matrices), ALLOCATIONS[self._problem.allocation].errors
        if source != "probes":
            return {name: _ERRORS[source](values) for name, values in spectra.items()}
        for matrix in self._problem.progress(matrices, "measuring ranks"):
            self._measure(matrix)
        damages = {matrix.name: self._measured[self._known_as(matrix)] for matrix in matrices}
        return {m.name: measured_errors(spectra[m.name], probe_rank(m), damages[m.name]) for m in matrices}

    def damage(self, matrices: Sequence[Matrix], specs: dict[str, Spec]) -> float:
        """What the whole model loses with these specs by name; matrices without one stay dense."""
        replaced = [matrix for matrix in matrices if matrix.name in specs]

        def measured() -> float:
            self._decompositions.store(replaced)
            changes = (self._decompositions.changes(matrix, specs[matrix.name]) for matrix in replaced)
            return self._problem.evidence.probe.damage({k: v for change in changes for k, v in change.items()})

        return self._problem.evidence.once(f"damage {sorted(specs.items())}", measured)

    def _spectra(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        self._decompositions.store(matrices)
        return {matrix.name: self._singular_values(matrix) for matrix in matrices}

    def _singular_values(self, matrix: Matrix) -> FloatArray:
        """In the solver's metric; those of an autoencoder are such that what they leave out is its error."""
        values = self._decompositions.singular_values(matrix)
        if not self._problem.storage.autoencodes(matrix):
            return values
        left = np.sum(values**2) * token_table(self._problem, matrix).errors
        saved = np.append(np.sum(values**2), left[:-1]) - left
        return np.sqrt(np.maximum(saved, 0.0))

    def _measure(self, matrix: Matrix) -> None:
        if self._known_as(matrix) in self._measured:
            return
        changes = self._decompositions.changes(matrix, self.spec(matrix, probe_rank(matrix)))
        self._measured[self._known_as(matrix)] = self._problem.evidence.probe.damage(changes)
        write_text(self._file, json.dumps(self._measured))

    def _known_as(self, matrix: Matrix) -> str:
        """What the damage of a matrix is kept under: of an autoencoder that depends on what it makes least."""
        storage = self._problem.storage
        return f"{matrix.name} {storage.objective}" if storage.autoencodes(matrix) else matrix.name

    @property
    def _measured(self) -> dict[str, float]:
        """Damage of each matrix at its probe rank, as far as it is known; see `_known_as`."""
        return self._problem.evidence.once(f"measured {self._file}", self._read)

    def _read(self) -> dict[str, float]:
        found: dict[str, float] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        return found

    @property
    def _file(self) -> Path:
        return self._problem.evidence.folder / f"ranks-{self._problem.key}-{self._problem.evidence.identity}.json"
