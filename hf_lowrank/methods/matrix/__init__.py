"""Truncated singular value decompositions: one matrix, or those of one input, at a time."""
