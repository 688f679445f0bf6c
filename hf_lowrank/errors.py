"""The one error a user's input can cause in the parts that stay home (shipped code raises `PlanError`), and notes."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, the rule, the value found and the remedy."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The beginning of an error's text on one line; the name of its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class Note(UserWarning):
    """Something the user did not ask for and should know, in one line that the command line prints too."""
