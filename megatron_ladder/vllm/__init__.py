"""A plug-in for vLLM: with it `vllm serve FOLDER` works for folders that `megatron-ladder export` writes.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. The
plug-in runs in vLLM's environment. It needs this package and `megatron_ladder.hf`, but not megatron-core.
"""


def register() -> None:
    """Registers the model with vLLM, and its configuration with transformers.

    With the configuration a folder loads without `--trust-remote-code`. vLLM imports the model's code only
    when it loads such a model.
    """
    from vllm import ModelRegistry

    import megatron_ladder.hf  # noqa: F401 (registers the configuration)

    ModelRegistry.register_model(
        "LadderForCausalLM", "megatron_ladder.vllm.model:LadderForCausalLM"
    )
