"""Which core attention do layers get on this machine, and how much time and memory does it take?

    python benchmarks/attention.py --json FILE

Measured is one causal attention with grouped queries, in bf16 on a GPU: Transformer Engine's module, where
it is installed, and torch's scaled_dot_product_attention. With NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 in the
environment, Transformer Engine prints why it chooses a backend.
"""

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from measuring import facts
from measuring.options import parser_of
from measuring.rows import Rows


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


class ByTe(nn.Module):
    """Transformer Engine's attention, as layers call it."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        class TEDotProductAttention(te.DotProductAttention):
            """It has the name of megatron-core's class, which `attention_of` looks for."""

        self.core_attention = TEDotProductAttention(
            args.heads,
            args.head_dim,
            num_gqa_groups=args.kv_heads,
            qkv_format="sbhd",
            attn_mask_type="causal",
            attention_dropout=0.0,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core_attention(q, k, v)


class ByTorch(nn.Module):
    """torch's attention, with a given kernel or with the kernel that torch chooses."""

    def __init__(self, kernel: SDPBackend | None) -> None:
        super().__init__()
        self._kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        one = contextlib.nullcontext() if self._kernel is None else sdpa_kernel(self._kernel)
        with one:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def measured(name: str, attend: nn.Module, args: argparse.Namespace, device: str) -> dict[str, Any]:
    on_gpu = device != "cpu"
    place = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"device": "cpu"}
    q, k, v = (
        torch.randn(args.tokens, 1, heads, args.head_dim, **place, requires_grad=True)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    times = []

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(args.steps + 2):  # two warm up
        begin = wait()
        output = attend(q, k, v)
        middle = wait()
        output.backward(torch.ones_like(output))
        times.append((middle - begin, wait() - middle))
    forward, backward = (1e3 * statistics.median(t[i] for t in times[2:]) for i in (0, 1))
    return {
        "by": name,
        "forward_ms": forward,
        "backward_ms": backward,
        "attention": name if isinstance(attend, ByTorch) else facts.attention_of(attend),
        **facts.peak_memory(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    columns = {"by": "{by}", "taken": "{attention}", "forward, ms": "{forward_ms:.2f}"}
    columns |= {"backward, ms": "{backward_ms:.2f}", "peak, GiB": "{peak_gib:.2f}"}
    return facts.table(rows, columns)


def main() -> None:
    args = arguments()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    tried: dict[str, Callable[[], nn.Module]] = {"torch, its choice": lambda: ByTorch(None)}
    if device != "cpu":
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            tried[f"torch, {kernel.name}"] = lambda kernel=kernel: ByTorch(kernel)  # type: ignore[misc]
        if importlib.util.find_spec("transformer_engine"):
            tried["Transformer Engine"] = lambda: ByTe(args)
    rows = Rows(device, args)
    for name, made in tried.items():
        with rows.case(by=name):
            rows.append(measured(name, made(), args, device))
    rows.end(table(rows))


if __name__ == "__main__":
    main()
