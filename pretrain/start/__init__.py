"""What happens before training: reading the arguments, checks, initial weights, launch, doctor."""
