"""How finely each number is kept: rounding in a metric, the bytes of what was rounded, the level for a size."""
