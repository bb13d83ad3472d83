"""Errors that end a program with one line for the user."""


class UserError(ValueError):
    """Bad input: one line that names the argument as typed, what was expected and what came; exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (NaN in the model's output, no space left on disk): one line; exit code 1."""


class Preempted(RunError):
    """A run that was ended by SIGTERM and can be resumed: one line; exit code 143."""
