"""Training: distillation, recovery, pruning, mixed ranks, rank schedules."""
