"""FlexAttention, which a GPU uses for packed rows, against the model itself. Forward, uncompiled."""

from __future__ import annotations

import families
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from trimtab.data.collate import collate
from trimtab.models import attention
from trimtab.models.layout import set_attention_kernel


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_block_mask_is_the_pieces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, groups = families.tiny(family), families.groups()
    set_attention_kernel(lm, attention.NAME)
    batch = collate(groups, layout="packed")
    truth = families.direct_logprobs(lm, groups)
    monkeypatch.setattr(attention, "uses_flex", lambda query: True)
    monkeypatch.setattr(attention, "_flex", lambda: flex_attention)
    with torch.no_grad():
        ours, _ = lm.token_logprobs(batch)
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)
