"""The error that a user sees, and how a name that does not exist is answered."""

import difflib


class UserError(Exception):
    """Something that the person at the keyboard can mend: one line saying what, where, what was
    expected, what to do.

    kind: of fault in a data set, by which `tools.validate` groups them.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


def choose(what: str, value: str, available) -> str:
    """The value, if it is available; else UserError with all that is, and the nearest."""
    if value not in available:
        raise UserError(
            f"unknown {what} '{value}'; available: {', '.join(available)}"
            f"{nearest(value, available)}"
        )
    return value


def nearest(value: str, available) -> str:
    """A question to append to an error about a value that does not exist; empty if none is near."""
    begun = [name for name in available if value and name.startswith(value)]
    names = difflib.get_close_matches(value, available, 1) or begun
    return f" (did you mean {names[0]}?)" if names else ""


def refuse(error: UserError) -> None:
    """What is done about a fault in the data unless somebody collects them (`tools.validate`):
    nothing is read any further.
    """
    raise error
