"""Commands as jobs of a SLURM cluster, or in the background of this machine."""
