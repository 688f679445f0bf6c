"""Looking at a model, and at methods side by side; nothing is changed."""
