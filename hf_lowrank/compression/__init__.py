"""From a dense model to a compressed one and back."""
