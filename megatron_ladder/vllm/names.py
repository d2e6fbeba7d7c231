"""Which weights of an exported folder vLLM stacks into one, and as what part of it."""

STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
"""Part of a name -> what stands there in vLLM, and the part's id. All other names are the same."""
