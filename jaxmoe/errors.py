"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a file, key, value or shape that the user gave.

    The message is one sentence or a short list: the value found, what was expected, and the remedy.
    Commands print it without a traceback and exit with code 2 (see ``jaxmoe.cli``); library callers
    catch it like any other exception.
    """
