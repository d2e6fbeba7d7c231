class UserError(ValueError):
    """A user's mistake: what is wrong, where, and what to do, in one or two lines.

    The command line prints it without a traceback and exits with 2.
    """
