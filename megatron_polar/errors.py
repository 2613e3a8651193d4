"""The one exception that means "you, the user, can mend this"."""


class UserError(ValueError):
    """Wrong input, configuration or environment: one line naming what, where, why and the remedy.

    The command line prints it without a traceback and exits with status 2. Anything else that escapes is our mistake
    and keeps its traceback.
    """
