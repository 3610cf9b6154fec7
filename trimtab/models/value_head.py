"""A value head on the policy's own trunk: one forward pass gives log-probabilities and values.

The head belongs to no transformers model: a policy with one is saved as the plain causal language model that
it is, and the head beside it, as a small file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from trimtab.batch import TreeBatch
from trimtab.errors import InputError
from trimtab.kernels.logps import Temperature
from trimtab.models.language_model import LanguageModel

FILE = "value_head.safetensors"
WEIGHT = "weight"


class ValueHead(nn.Module):
    """One value of a hidden state ``[D]``, linear, no bias; from zeros, kept and read in fp32 or fp64."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=wide, device=device))

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Values ``[M]``, in the weight's dtype."""
        return F.linear(hidden_MD.to(self.weight.dtype), self.weight)[:, 0]

    def save(self, folder: Path) -> None:
        """Into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({WEIGHT: self.weight.detach().contiguous().cpu()}, folder / FILE)


def value_head_of(lm: LanguageModel) -> ValueHead:
    """A head of zeros that fits the model's hidden states."""
    # Asked, not read from the configuration: some families project their last hidden state.
    with torch.no_grad():
        one = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
        width = lm.trunk(input_ids=one, use_cache=False).last_hidden_state.shape[-1]
    return ValueHead(width, lm.dtype, lm.device)


def load_value_head(folder: Path, lm: LanguageModel) -> ValueHead:
    """What :meth:`ValueHead.save` wrote. Raises InputError for a file that is none or does not fit."""
    head = value_head_of(lm)
    try:
        weight = load_file(folder / FILE)[WEIGHT]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{folder / FILE}: not a value head as trimtab ppo saves one ({error})") from None
    if weight.shape != head.weight.shape:
        raise InputError(
            f"{folder / FILE} reads hidden states of width {weight.shape[-1]}, the model has "
            f"{head.weight.shape[-1]}: they are not of one run"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def logprobs_and_values(
    lm: LanguageModel,
    head: ValueHead,
    batch: TreeBatch,
    *,
    temperature: Temperature = 1.0,
    entropy: bool = False,
    detach: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``lm.token_logprobs``, and of the same pass the value of the state before each counted token.

    Each ``[N, T]``, 0 where nothing counts. ``detach`` keeps the values' gradient out of the trunk.
    """
    with _kept_hidden(lm) as kept:
        logps_NT, entropy_NT = lm.token_logprobs(batch, temperature=temperature, entropy=entropy)
    hidden_BLD = kept[0]
    hidden_MD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1]).index_select(0, batch.sources_NT[batch.mask_NT])
    values_M = head(hidden_MD.detach() if detach else hidden_MD)
    values_NT = values_M.new_zeros(batch.mask_NT.shape).masked_scatter(batch.mask_NT, values_M)
    return logps_NT, entropy_NT, values_NT


@contextmanager
def _kept_hidden(lm: LanguageModel) -> Iterator[list[torch.Tensor]]:
    """The trunk's last hidden states ``[B, L, D]``, once it has been called; whatever stands on the trunk."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        kept.append(output.last_hidden_state)  # type: ignore[attr-defined]

    handle = lm.trunk.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
