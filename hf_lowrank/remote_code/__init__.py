"""Code that travels with every saved model: torch, transformers and the files beside it, nothing else."""
