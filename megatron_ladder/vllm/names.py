"""The weights of an exported folder that vLLM stacks to one weight, and the part that each one becomes."""

STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
"""Part of a weight's name -> that part of vLLM's name, and vLLM's shard id. Other names are the same."""
