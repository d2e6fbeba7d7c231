"""torch's cuDNN attention is taken only where it runs."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_ladder.layers.attention import core


@pytest.mark.parametrize("error", ["", "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"])
def test_a_broken_cudnn_is_left_out(
    error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = [True]

    def choice(*_: Any, **__: Any) -> int:
        kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        return kernels[allowed[0]].value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    monkeypatch.setattr(core, "_error_of_cudnn", lambda *_: error)
    monkeypatch.setattr(
        torch.backends.cuda, "enable_cudnn_sdp", lambda on: allowed.__setitem__(0, on)
    )
    kernel = core.kernel_of_torch((1, 4, 128, 64), 2, torch.bfloat16, apart=False, dropout=0.0)
    assert kernel == ("flash" if error else "cudnn")
    assert bool(caplog.text) == bool(error)
    assert allowed == [not error]
