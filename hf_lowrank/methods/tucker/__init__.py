"""Tucker decompositions: the blocks of all layers as one tensor, with factors in common."""
