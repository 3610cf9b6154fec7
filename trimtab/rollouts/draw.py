"""One token for every running row, from its logits: compiled in the common case, in PyTorch otherwise."""

from __future__ import annotations

import numpy as np
import torch

from trimtab.kernels import decode
from trimtab.rollouts.sampling import SamplingConfig, draw, exponential_noise, sampler_logprobs
from trimtab.rollouts.strategies import Mix


def draw_tokens(
    logits_RV: torch.Tensor,
    config: SamplingConfig,
    hashes_V: torch.Tensor,
    keys_R: np.ndarray,
    positions_R: np.ndarray,
    ends: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their sampler_ log-probabilities, ``[R]`` each.

    ``positions_R`` is how many tokens each row has; below ``min_new_tokens`` it draws no end (``ends``, int64
    ids). The logits may be overwritten. Both forms draw with the same noise.
    """
    held = positions_R < config.min_new_tokens
    if config.temperature > 0 and not config.filtered:
        made = decode.draw(logits_RV, config.temperature, hashes_V, keys_R, positions_R, held, ends)
        if made is not None:
            return made
    if held.any() and len(ends):
        rows = torch.from_numpy(np.flatnonzero(held)).to(logits_RV.device)
        logits_RV[rows[:, None], torch.from_numpy(ends).to(logits_RV.device)] = -torch.inf
    noise_RV = exponential_noise(keys_R, positions_R, hashes_V)
    tokens, logps = draw(sampler_logprobs(logits_RV, config), noise_RV)
    return tokens.cpu().numpy(), logps.cpu().numpy()


def draw_mixed(
    logits_RV: torch.Tensor,
    mix: Mix,
    samples_R: np.ndarray,
    hashes_V: torch.Tensor,
    keys_R: np.ndarray,
    positions_R: np.ndarray,
    ends: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`draw_tokens` for rows of several strategies; ``samples_R``: a row's place in its group."""
    tokens_R, logps_R = np.empty(len(keys_R), dtype=np.int64), np.empty(len(keys_R), dtype=np.float32)
    slots_R = mix.slots[samples_R]
    for slot, way in enumerate(mix.ways):
        rows = np.flatnonzero(slots_R == slot)
        if len(rows):
            logits = logits_RV[torch.from_numpy(rows).to(logits_RV.device)]
            made = draw_tokens(logits, way, hashes_V, keys_R[rows], positions_R[rows], ends)
            tokens_R[rows], logps_R[rows] = made
    return tokens_R, logps_R
