"""Models whose weights stay on disk: each parameter, the whole, and running it block by block."""
