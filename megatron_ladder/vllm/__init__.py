"""A plug-in of vLLM: `vllm serve FOLDER` for the folders that `megatron-ladder export` writes.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes.
It runs in vLLM's environment: of this project it needs this package and `hf`, not megatron-core.
"""


def register() -> None:
    """Tells vLLM of the model, which is imported when it is used, and transformers of its configuration,
    so that a folder loads without `--trust-remote-code`."""
    from vllm import ModelRegistry

    import megatron_ladder.hf  # noqa: F401 (registers the configuration)

    ModelRegistry.register_model(
        "LadderForCausalLM", "megatron_ladder.vllm.model:LadderForCausalLM"
    )
