"""Generation with megatron-core's engine, from runs and exported folders, and an HTTP server for it."""
