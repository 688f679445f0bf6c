"""What a model is shown: rows and batches of text, images and sounds from anything, and what it is watched on."""
