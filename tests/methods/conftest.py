"""What the tests of whole runs need besides the tiny world."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture
def norms_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds every norm to fp32, also in an fp64 model: 1e-8 in a gradient."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.square().mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
