"""The two failures that a user can cause; the command line prints their text and nothing else."""


class UsageError(Exception):
    """The options are wrong: exit code 2."""


class RunError(Exception):
    """The options are right, but the data, the model or the run is not: exit code 1."""
