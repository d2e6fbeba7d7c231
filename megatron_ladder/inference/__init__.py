"""Generation with megatron-core's inference engines and this project's layers and collectives."""
