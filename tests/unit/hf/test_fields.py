"""A config.json from a stranger: absurd sizes and types are refused before transformers reads it."""

import json
from pathlib import Path

import pytest

from megatron_ladder.errors import UserError
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        # transformers makes a list of so many names: the system ended the process.
        ({"num_hidden_layers": 3 * 10**8}, "num_hidden_layers is 300000000: it must be"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": [[]]}, r"vocab_size is \[\[\]\]"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_parameters": {"rope_type": "linear", "factor": []}}, r"rope_parameters.factor is"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"eos_token_id": [1, 1 << 40]}, "eos_token_id is"),
        ({"architectures": 5}, "architecture none is not supported"),
        ({"architectures": [{}]}, "architecture {} is not supported"),
        ({"model_type": "bert"}, "model_type bert does not go with Qwen2ForCausalLM"),
        ({"layer_types": [1]}, "layer_types is"),
        ({"num_experts": 10**8}, "num_experts is 100000000"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers is"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    ],
)
def test_absurd_models(fields, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    to_model_config(read_hf_config(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL | fields))
    with pytest.raises(UserError, match=said):
        read_hf_config(tmp_path)
