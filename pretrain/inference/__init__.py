"""Generation from runs and exported folders by megatron-core's engine, and an HTTP server of it."""
