"""What a user is told in one line."""


class UserError(ValueError):
    """Bad input: one line that names the argument as typed, what was expected and what came; exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (NaN in the model's output, no space left on disk): one line; exit code 1."""


class Preempted(RunError):
    """A run that was asked to end (SIGTERM) and can be continued: one line; exit code 143."""
