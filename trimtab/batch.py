"""TreeBatch: the tensors that a set of groups becomes, and the legend of every shape in the package.

Axis suffixes, used in every file that holds tensors:

    _B  rows of the model's input          _L  tokens in a row (prompt, then its responses, then padding)
    _N  responses in the batch             _T  tokens of a response (padded to the longest)
    _G  responses in a group               _P  prompts (groups)
    _V  vocabulary                         _D  hidden width

In the packed layout there is one row, which holds every group one after another without padding: the
prompt's tokens once, then each response's. In the tree layout a row is one group, in the same order. In the
plain layout a row is one response with its own copy of the prompt. Everything after the forward pass sees
``[N, T]`` tensors and cannot tell the layouts apart.

Masks are boolean and True means "counts". They are aligned with the targets: entry ``[n, t]`` belongs
to response n's own token t, whose prediction is read at ``sources_NT[n, t]``. That gather is the only
shift in the package.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["packed", "tree", "plain"]

PADDING = -1
"""Segment number of a padding token."""
PROMPT = 0
"""Segment number of a prompt token; response k of the row has segment k + 1."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens in a packed row that attend to each other causally: ``[start, stop)``.

    The tokens ``[stop, last)`` that follow it continue it: they see all of it. A prompt's span is continued
    by each of its responses; a response's by nothing (stop = last).
    """

    start: int
    stop: int
    last: int


@dataclass(slots=True)
class TreeBatch:
    """One micro-batch, ready for the model.

    Two responses, "b c" and "d", to the prompt "x a", in the tree layout:

        input_ids_BL     x  a  b  c  d
        position_ids_BL  0  1  2  3  2
        segments_BL      0  0  1  1  2
        sources_NT       [[1, 2], [1, ·]]     the last prompt token predicts both first tokens
        targets_NT       [[b, c], [d, ·]]
        mask_NT          [[1, 1], [1, 0]]
        lasts_N          [3, 4]               c and d: where a whole response is read
    """

    input_ids_BL: torch.Tensor
    position_ids_BL: torch.Tensor
    segments_BL: torch.Tensor
    """int64: PADDING, PROMPT, or 1 + the response's place in its row."""
    sources_NT: torch.Tensor
    """int64 index into the flattened B·L positions; 0 where there is no token."""
    targets_NT: torch.Tensor
    """int64 token ids; 0 where there is no token."""
    mask_NT: torch.Tensor
    """bool: the token exists and counts."""
    lasts_N: torch.Tensor
    """int64 index of each response's last token into the B·L positions; an empty one's is its prompt's."""
    weights_N: torch.Tensor
    """float: the group's weight, for each of its responses."""
    branching: bool
    """Some row holds more than one response, so attention needs the tree mask."""
    spans: tuple[Span, ...] = ()
    """Of a packed row, which sees whom; empty in the other layouts."""
    temperatures_N: torch.Tensor | None = None
    """fp64: what each response's tokens were drawn at, NaN where it does not say; None where none says."""

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch on another device."""
        moved = {
            f.name: value.to(device) if isinstance(value := getattr(self, f.name), torch.Tensor) else value
            for f in dataclasses.fields(self)
        }
        return TreeBatch(**moved)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_ids_BL.numel()

    def temperature(self, otherwise: float) -> float | torch.Tensor:
        """What the responses were drawn at: a number where it is one for all, else ``[N]``.

        ``otherwise`` is the run's own temperature, of the responses that do not say.
        """
        if self.temperatures_N is None:
            return otherwise
        found_N = torch.nan_to_num(self.temperatures_N, nan=otherwise)
        first = float(found_N[0])
        return first if bool((found_N == first).all()) else found_N

    def attention_mask_BLL(self, window: int | None = None) -> torch.Tensor:
        """True where query (second-last axis) may see key (last axis), shape ``[B, 1, L, L]``.

        A response sees its prompt and its own past; ``window`` limits how far back, in positions (not
        in packed places: siblings that lie between do not use it up). Padding sees only itself, because
        a row of attention with no key at all is NaN in some kernels.
        """
        segment_k = self.segments_BL[:, None, :]
        segment_q = self.segments_BL[:, :, None]
        index = torch.arange(self.segments_BL.shape[1], device=self.segments_BL.device)
        past = index[None, :] <= index[:, None]
        allowed = ((segment_k == PROMPT) | (segment_k == segment_q)) & past & (segment_q != PADDING)
        if window is not None:
            distance = self.position_ids_BL[:, :, None] - self.position_ids_BL[:, None, :]
            allowed &= distance < window
        allowed |= (index[None, :] == index[:, None]) & (segment_q == PADDING)
        return allowed[:, None]

    def ragged(self, values_NT: torch.Tensor) -> list[list[float]]:
        """Per response, the values of the tokens that count, as plain lists (for a Response record)."""
        rows = values_NT.detach().to("cpu", torch.float64)
        mask = self.mask_NT.cpu()
        return [row[keep].tolist() for row, keep in zip(rows, mask, strict=True)]

    def padded(self, rows: list[list[float]]) -> torch.Tensor:
        """The inverse of :meth:`ragged`: float64 ``[N, T]``, 0 where nothing counts.

        Raises ValueError when a row's length is not the number of tokens that count.
        """
        out = torch.zeros(self.mask_NT.shape, dtype=torch.float64)
        for n, (row, keep) in enumerate(zip(rows, self.mask_NT.cpu(), strict=True)):
            if len(row) != int(keep.sum()):
                raise ValueError(f"response {n} has {int(keep.sum())} counted tokens but {len(row)} values")
            out[n, keep] = torch.tensor(row, dtype=torch.float64)
        return out.to(self.mask_NT.device)
