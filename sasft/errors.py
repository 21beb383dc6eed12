"""The one exception that means: you can mend this, and the message says how."""


class UsageError(ValueError):
    """Input, a setting or a place on disk that cannot be used.

    The message names the argument or file, what came, what is needed and the fix; the command line
    prints it alone, without a traceback, and exits with 2.
    """
