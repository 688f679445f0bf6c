"""What text: rows and batches from anything, and the text a model is watched on."""
