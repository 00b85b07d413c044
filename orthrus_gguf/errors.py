"""The one exception type that users are meant to see."""


class OrthrusError(Exception):
    """A problem that the user can act on: one line that says where, what, and what to do next.

    Commands print it without a traceback (unless `--verbose`) and exit with code 1.
    """
