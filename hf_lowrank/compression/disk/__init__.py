"""Compressing models whose weights stay on disk: which those are, what it takes, and how."""
