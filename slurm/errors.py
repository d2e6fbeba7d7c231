class UserError(ValueError):
    """A user's mistake, or a refusal of SLURM's: what is wrong, where, and what to do. Printed without a
    traceback."""
