"""What is written down of a model, and of the machine it was measured on."""
