"""The one error a user's input can cause in the parts that stay home (shipped code raises `PlanError`)."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, the rule, the value found and the remedy."""
