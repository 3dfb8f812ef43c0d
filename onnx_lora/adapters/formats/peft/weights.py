"""PEFT's methods that change a weight in another way than by products of factors: what a module's tensors come to.

The reference is PEFT 0.21: each method's `layer.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_lora.adapters.adapter import Replacement
from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.method import Module, Part, TensorError
from onnx_lora.adapters.formats.peft.patterns import Endings
from onnx_lora.adapters.methods.boft import BOFT
from onnx_lora.adapters.methods.c3a import C3A
from onnx_lora.adapters.methods.fourierft import FourierFT
from onnx_lora.adapters.methods.hira import HiRA
from onnx_lora.adapters.methods.hra import HRA
from onnx_lora.adapters.methods.ia3 import IA3
from onnx_lora.adapters.methods.oft import OFT
from onnx_lora.adapters.methods.shapes import wide
from onnx_lora.adapters.methods.shira import SHiRA
from onnx_lora.expressions import Expression

__all__ = ["boft", "c3a", "fourierft", "hira", "hra", "ia3", "oft", "shira", "whole_copies"]


# PEFT's default is 5; far more than a sum of powers needs.
_MOST_TERMS = 1000


def ia3(module: Module) -> Part:
    """`[out, 1]`, or `[1, in]` in a feed-forward module; of a convolution `[1, n, 1, …]` both times."""
    values = module.tensor("ia3_l")
    vector = module.vector("ia3_l")
    said = _is_feedforward(module)
    if values.ndim == 2 and values.shape != (1, 1):
        feedforward = len(values) == 1
        module.must(said in (None, feedforward), "feedforward_modules of the config says otherwise than the shape")
    else:
        module.must(said is not None, "feedforward_modules of the config must say whether inputs or outputs are scaled")
        feedforward = bool(said)
    bias = {} if feedforward else {f"{module.name}.bias": Replacement(wide(vector), operation="multiply")}
    return Part(change=IA3(vector, feedforward), whole=bias)


def _is_feedforward(module: Module) -> bool | None:
    """As PEFT: a regular expression, or the ends of names without a dot before them."""
    names = module.config.once(_feedforward)
    if names is None:
        return None
    return names.fullmatch(module.name) if isinstance(names, Expression) else names.first(module.name) is not None


def _feedforward(fields: Mapping[str, Any]) -> Expression | Endings | None:
    """Raises TensorError: no names. ExpressionError: no expression."""
    names = fields.get("feedforward_modules")
    if names is None:
        return None
    if isinstance(names, str):
        return Expression(names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TensorError(f"feedforward_modules of the config must be names, and is {shown(names)}")
    return Endings(names)


def oft(module: Module) -> Part:
    fields, embedding = module.config.fields, module.has("oft_embedding_R")
    angles = module.tensor("oft_embedding_R" if embedding else "oft_R", 2)
    series = bool(fields.get("use_cayley_neumann", True))
    module.must(
        not series or _since_0_18(fields.get("peft_version")),
        "use_cayley_neumann: PEFT 0.18 made another series of it, and the config names no PEFT as new; merge it with "
        "the PEFT that trained it, and export that",
    )
    root = math.isqrt(1 + 8 * angles.shape[1])
    module.must(
        root * root == 1 + 8 * angles.shape[1] and angles.shape[1] > 0 and len(angles) > 0,
        "OFT's angles must be those above a diagonal",
    )
    shared = bool(fields.get("block_share"))
    module.must(not shared or len(angles) == 1, "block_share of the config says that there is one block")
    terms = module.count("num_cayley_neumann_terms") if series else None
    module.must(terms is None or terms <= _MOST_TERMS, f"num_cayley_neumann_terms must be at most {_MOST_TERMS}")
    bound = module.number("eps") if fields.get("coft") else None
    return Part(change=OFT(angles, shared, terms, bound, embedding))


def _since_0_18(version: object) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) >= (0, 18)


def boft(module: Module) -> Part:
    blocks, scale = module.tensor("boft_R", 4), module.vector("boft_s")
    module.must(blocks.shape[2] == blocks.shape[3] and blocks.size > 0, "BOFT's blocks must be square")
    return Part(change=BOFT(blocks, scale))


def hra(module: Module) -> Part:
    columns, rank = module.tensor("hra_u", 2), module.config.ranks.rank
    module.must(columns.shape[1] == rank and columns.size > 0, f"HRA must have the config's r, {rank} columns")
    module.must(bool(columns.any(axis=0).all()), "a column of zeros has no direction to reflect along")
    return Part(change=HRA(columns, bool(module.config.fields.get("apply_GS"))))


def hira(module: Module) -> Part:
    """The config's rank says nothing: there is no scale, and PEFT 0.21 forgets its rank_pattern."""
    embedding = module.has("hira_embedding_A")
    prefix = f"hira_{'embedding_' if embedding else ''}"
    a, b = module.tensor(f"{prefix}A"), module.tensor(f"{prefix}B")
    module.must(
        a.ndim == b.ndim >= 2 and a.size > 0 and b.size > 0 and len(a) == b.shape[1] and math.prod(b.shape[2:]) == 1,
        "HiRA's factors must be of one rank",
    )
    return Part(change=HiRA(a.reshape(len(a), -1), b.reshape(b.shape[:2]), embedding))


def shira(module: Module) -> Part:
    values, places = module.tensor("shira_weight", 1), module.tensor("shira_indices", 2)
    module.must(places.shape == (2, values.size), "SHiRA must have a place for each value")
    numbers = places.astype(np.float64)
    module.must(bool((np.isfinite(numbers) & (numbers == np.floor(numbers))).all()), "SHiRA's places must be whole")
    return Part(change=SHiRA(places.astype(np.int64), values))


def fourierft(module: Module) -> Part:
    spectrum, seed = module.tensor("fourierft_spectrum", 1), module.count("random_loc_seed", least=0)
    note = "the places of FourierFT's frequencies are not in the file: drawn from random_loc_seed, as PyTorch does"
    return Part(change=FourierFT(spectrum, module.number("scaling", least=-1e30), seed), note=note)


def c3a(module: Module) -> Part:
    kernels = module.tensor("c3a_kernel", 3)
    module.must(kernels.size > 0, "C3A must have kernels")
    return Part(change=C3A(kernels))


def whole_copies(module: Module) -> Part:
    """LN tuning: all of its tensors are whole parameters, so no module has others."""
    raise AssertionError(module.name)
