"""What is this model: its matrices, blocks, outputs and folder, whatever its architecture."""
