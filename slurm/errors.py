class UserError(ValueError):
    """A user's mistake, or SLURM refuses: what is wrong, where, and what to do. Printed without a
    traceback."""
