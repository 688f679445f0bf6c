"""Tensor trains: one a matrix, or one central core for the same matrix of all layers."""
