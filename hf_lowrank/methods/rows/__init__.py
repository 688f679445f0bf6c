"""Autoencoders of the rows of matrices, with a decoder in common."""
