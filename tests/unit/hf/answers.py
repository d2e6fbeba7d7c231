"""What a model answers, by each attention and each cache.

Also a script that asks exported folders with other packages, in a process without ours:

    python -I answers.py PACKAGES FOLDER...  # writes results.pt: its version, and their answers
"""

import sys
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

import torch
import transformers


def answers(model: Any) -> dict[str, torch.Tensor]:
    """Logits and greedy tokens of a batch whose second sequence is padded on the left; a gradient."""
    ids = torch.arange(3, 53).reshape(2, 25)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            found[f"{attention} logits"] = model(ids, attention_mask=mask).logits[mask.bool()]
        for cache in ("dynamic", "static", None):
            through = {"cache_implementation": cache} if cache else {"use_cache": False}
            tokens = model.generate(ids, attention_mask=mask, **through, **how)
            found[f"{attention}, {cache} cache"] = tokens
    model.train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    found["gradient"] = model.model.embed_tokens.weight.grad
    return found


if __name__ == "__main__":
    packages, *folders = sys.argv[1:]
    assert transformers.__file__.startswith(packages)
    torch.set_num_threads(1)
    results = [transformers.__version__]
    for folder in folders:
        remote = {"trust_remote_code": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **remote)
        assert len(tokenizer.encode("def f(x):")) > 3
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **remote)
        assert type(model).__module__.startswith("transformers_modules")
        results.append(answers(model))
    assert not any(name.startswith(("megatron", "pretrain")) for name in sys.modules)
    torch.save(results, "results.pt")
