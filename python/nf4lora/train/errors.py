"""The two failures that a user can cause; the command line prints their text and nothing else."""


class UsageError(Exception):
    """The options are wrong: exit code 2."""


class RunError(Exception):
    """The options are right, but the data, the model or the run is not: exit code 1."""


def reason(error: BaseException) -> str:
    """What an exception of the system or a library says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
