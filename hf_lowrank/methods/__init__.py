"""How the numbers that take the place of dense matrices are found: one row of `METHODS` a method."""
