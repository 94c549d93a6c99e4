"""What ends a run with one line instead of a traceback."""


class UsageError(ValueError):
    """A flag, a directory or a checkpoint is wrong: said before any expensive step; exit code 2."""


class DivergedError(ArithmeticError):
    """The loss or the state is no longer finite: training stops; exit code 1."""
