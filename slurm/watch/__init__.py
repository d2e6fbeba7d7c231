"""`megatron-ladder status`, `logs` and `cancel`."""
