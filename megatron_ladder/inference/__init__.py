"""Generation by megatron-core's inference engines, with this project's layers and their collectives."""
