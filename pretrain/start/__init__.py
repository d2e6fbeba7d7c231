"""From options to ranks that are ready: arguments, checks, initial weights, launch, doctor."""
