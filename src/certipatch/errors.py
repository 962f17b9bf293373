"""The one error that means: the input is wrong, here is what to do. The command line prints it and exits with 2."""


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong, with the value, and what to do."""
