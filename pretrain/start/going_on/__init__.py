"""Where training goes on from a checkpoint: of the same run, or of the run that it branches off."""
