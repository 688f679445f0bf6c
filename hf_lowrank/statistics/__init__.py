"""What a model does on text, matrix by matrix: the second moments that data-aware solvers weight errors by."""
