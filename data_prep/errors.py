class UserError(ValueError):
    """A user's mistake: what is wrong, where, and what to do. Printed without a traceback."""
