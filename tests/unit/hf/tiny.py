"""Small models and tokenizers."""

import io
from pathlib import Path

import sentencepiece
import torch

from megatron_ladder.hf import LadderConfig, LadderForCausalLM

VOCAB = 500
LAYERS = 4
# Each residual kind, and the hybrids.
KINDS = {
    "standard": {"residual": "standard"},
    "ladder": {"residual": "ladder"},
    "parallel": {"residual": "parallel"},
    "last 2": {"residual": "ladder", "ladder_layers": 2},
    "layers 0 and 2": {"residual": "ladder", "ladder_layers": [0, 2]},
    "parallel-ladder": {"residual": "parallel-ladder"},
    "parallel-ladder 0 and 2": {"residual": "parallel-ladder", "ladder_layers": [0, 2]},
}
# Residual scaling of some kinds.
SCALED = {
    "ladder by skipinit": {"residual": "ladder", "residual_scaling": "skipinit"},
    "standard by 1/sqrt-n": {"residual": "standard", "residual_scaling": "1/sqrt-n"},
    "parallel by 1/sqrt-n": {"residual": "parallel", "residual_scaling": "1/sqrt-n"},
    "layers 0 and 2 by 1/n": {
        "residual": "ladder",
        "ladder_layers": [0, 2],
        "residual_scaling": "1/n",
    },
    "parallel-ladder by skipinit": {"residual": "parallel-ladder", "residual_scaling": "skipinit"},
    "ladder without norms": {
        "residual": "ladder",
        "residual_scaling": "1/sqrt-n",
        "layer_norms": False,
    },
}
# Mixtures of experts, of some kinds.
FOUR = {"num_experts": 4, "moe_intermediate_size": 24}
EXPERTS = {
    "ladder, experts": {"residual": "ladder", **FOUR},
    "standard, shared expert": {
        **(FOUR | {"residual": "standard", "shared_expert_intermediate_size": 40}),
        "norm_topk_prob": False,
    },
    "last 2, expert bias, some MLPs": {
        **(FOUR | {"residual": "ladder", "ladder_layers": 2, "mlp_only_layers": [0, 2]}),
        **{"scoring_func": "sigmoid", "expert_bias": True},
    },
    "parallel, one expert": {
        **(FOUR | {"residual": "parallel", "num_experts_per_tok": 1}),
        "scoring_func": "sigmoid",
    },
    "parallel-ladder, three experts": {
        **(FOUR | {"residual": "parallel-ladder", "num_experts_per_tok": 3}),
        "shared_expert_intermediate_size": 8,
    },
}
# Some layers with a window, shorter than the tests' sequences.
WINDOWS = {
    "residual": "ladder",
    "sliding_window": 6,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config(**changes) -> LadderConfig:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LadderConfig(**(fields | changes))


def model(**changes) -> LadderForCausalLM:
    """A random fp32 model whose layers matter: weights are large and norms are not ones."""
    built = LadderForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name or "scales" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return built


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def train_sentencepiece(folder: Path, kind: str, **changes) -> Path:
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))
    )
    buffer = io.BytesIO()
    options = {
        "vocab_size": VOCAB,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "user_defined_symbols": ["\n", "\t"],
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source[i : i + 1000] for i in range(0, len(source), 1000)),
        model_writer=buffer,
        model_type=kind,
        **(options | changes),
    )
    path = folder / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    return path
