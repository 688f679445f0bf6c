"""Every method and every solver of single matrices: what is in the table is tested."""

from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.methods.table import METHODS

SOLVERS = {name: row.method.solver for name, row in METHODS.items() if isinstance(row.method, MatrixMethod)}
TENSOR_METHODS = {name: row for name, row in METHODS.items() if name not in SOLVERS}
