"""One step as a timeline, collectives over a modelled link, and every kind on this machine's GPUs."""
