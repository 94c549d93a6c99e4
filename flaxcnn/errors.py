"""What a user can mend, as opposed to a fault of ours: command lines tell it in one line."""


class InputError(ValueError):
    """A name, a number or a file that was given is wrong; the message says what would work."""


class WeightsError(InputError):
    """Weights cannot be had, read or used: the message says which, and why."""


class PictureError(InputError):
    """A file holds no picture that can be used: the message says which, and why."""
