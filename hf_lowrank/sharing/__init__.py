"""Folders, their proof, their cards, and the Hub."""
