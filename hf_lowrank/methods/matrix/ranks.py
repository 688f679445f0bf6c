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
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.curves import measured_errors, predicted_errors, probe_rank, spectral_errors
from hf_lowrank.planning.prices import FloatArray

# Where errors come from -> what makes them from singular values alone; `analyze` asks for them of any allocation.
_ERRORS = {"none": spectral_errors, "spectra": spectral_errors, "curvature": predicted_errors}


class RankErrors:
    """Tells what ranks of the matrices of a problem cost in quality."""

    def __init__(self, problem: Problem, decompositions: Decompositions) -> None:
        self._problem = problem
        self._decompositions = decompositions

    def sizes(self, matrix: Matrix, rank: int) -> dict[str, int]:
        """What a spec says of a matrix of that rank; for an autoencoder, the best sizes that cost as much."""
        table = self._decompositions.table(matrix)
        return {"rank": rank} if table is None else table.sizes(rank, self._problem.dtype.itemsize)

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
        return {m.name: measured_errors(spectra[m.name], probe_rank(m), self._measured[m.name]) for m in matrices}

    def damage(self, matrices: Sequence[Matrix], ranks: dict[str, int]) -> float:
        """What the whole model loses at these ranks; matrices without one stay dense."""
        replaced = [matrix for matrix in matrices if matrix.name in ranks]

        def measured() -> float:
            self._decompositions.store(replaced)
            changes = (self._decompositions.changes(matrix, ranks[matrix.name]) for matrix in replaced)
            return self._problem.evidence.probe.damage({k: v for change in changes for k, v in change.items()})

        return self._problem.evidence.once(f"damage {sorted(ranks.items())}", measured)

    def _spectra(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        self._decompositions.store(matrices)
        return {matrix.name: self._singular_values(matrix) for matrix in matrices}

    def _singular_values(self, matrix: Matrix) -> FloatArray:
        """In the solver's metric; those of an autoencoder are such that what they leave out is its error."""
        values, table = self._decompositions.singular_values(matrix), self._decompositions.table(matrix)
        if table is None:
            return values
        left = np.sum(values**2) * table.errors
        saved = np.append(np.sum(values**2), left[:-1]) - left
        return np.sqrt(np.maximum(saved, 0.0))

    def _measure(self, matrix: Matrix) -> None:
        if matrix.name in self._measured:
            return
        changes = self._decompositions.changes(matrix, probe_rank(matrix))
        self._measured[matrix.name] = self._problem.evidence.probe.damage(changes)
        write_text(self._file, json.dumps(self._measured))

    @property
    def _measured(self) -> dict[str, float]:
        """Damage of each matrix at its probe rank, by name, as far as it is known."""
        return self._problem.evidence.once(f"measured {self._file}", self._read)

    def _read(self) -> dict[str, float]:
        found: dict[str, float] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        return found

    @property
    def _file(self) -> Path:
        return self._problem.evidence.folder / f"ranks-{self._problem.key}-{self._problem.evidence.identity}.json"
