"""The scale of a pair of factors: the one place where alpha and rank become a number. It knows no format."""

from __future__ import annotations

import math

__all__ = ["lora_scale"]


def lora_scale(alpha: float, rank: float, *, rslora: bool = False) -> float:
    """alpha / r, LoRA (Hu et al. 2021), section 4.1; or alpha / sqrt(r), rsLoRA (Kalajdzievski 2023), equation 4.

    `rank` is the one that the trainer divided by, which need not be that of the factors. Not zero.
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank
