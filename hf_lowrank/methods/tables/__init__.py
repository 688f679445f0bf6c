"""Autoencoders of token tables."""
