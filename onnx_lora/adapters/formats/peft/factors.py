"""PEFT's methods that add products of factors, other than LoRA: what a module's tensors come to.

The reference is PEFT 0.21: each method's `layer.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import Delta, MatrixDelta
from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.method import Module, Part, TensorError
from onnx_lora.adapters.methods.gralora import GraLoRA
from onnx_lora.adapters.methods.loha import LoHa
from onnx_lora.adapters.methods.lokr import LoKr
from onnx_lora.adapters.methods.miss import MiSS
from onnx_lora.adapters.methods.randlora import RandLoRA
from onnx_lora.adapters.methods.shapes import Floats, columns, rows, wide
from onnx_lora.adapters.methods.vblora import VBLoRA
from onnx_lora.adapters.methods.vera import VeRA
from onnx_lora.points import Array

__all__ = ["adalora", "delora", "gralora", "loha", "lokr", "miss", "pvera", "randlora", "vblora", "vera"]

# How AdaLoRA's rank_pattern names a module: by its singular values, once with the adapter's name behind.
_SINGULAR = re.compile(r"^(?:base_model\.model\.)*(?P<module>.+)\.lora_E(?:\.[^.]+)?$")


def adalora(module: Module) -> Part:
    """`scale · B · (A ∘ E)`, with alpha / ranknum where LoRA has alpha / r. AdaLoRA (Zhang et al. 2023)."""
    a, b, e = module.tensor("lora_A", 2), module.tensor("lora_B", 2), module.tensor("lora_E", 2)
    kept = module.config.once(_marks).get(module.name)
    first = module.config.ranks.rank
    module.must(
        kept is None or (isinstance(kept, list) and len(kept) == first), f"rank_pattern must have {first} marks"
    )
    rank = first if kept is None else sum(map(bool, kept))
    module.must(
        a.shape[0] == rank == b.shape[1] and e.shape == (rank, 1), f"the rank must be {rank} by init_r and rank_pattern"
    )
    if not rank:
        return Part(note=f"{module.name}: AdaLoRA pruned it to rank 0, and it stays at the base")
    number = float(first)
    if module.has("ranknum"):
        stored = module.vector("ranknum")
        module.must(stored.size == 1 and bool(np.isfinite(stored).all()), "ranknum must be one number")
        number = float(stored[0])
    alpha = module.config.ranks.alpha
    factors = wide(a) * wide(e)
    return Part(MatrixDelta(factors, b, (alpha if alpha > 0 else rank) / (number + 1e-5)))


def _marks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`rank_pattern` by module; the first of two counts. Raises TensorError: it is no table."""
    pattern = fields.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise TensorError(f"rank_pattern of the config must map modules to marks, and is {shown(pattern)}")
    marks: dict[str, Any] = {}
    for key, kept in pattern.items():
        found = _SINGULAR.match(key)
        if found:
            marks.setdefault(found["module"], kept)
    return marks


def loha(module: Module) -> Part:
    left, right = (_product(module, f"hada_w{side}", f"hada_t{side}") for side in "12")
    module.must(module.has("hada_t1") == module.has("hada_t2"), "LoHa must have hada_t1 and hada_t2, or none of them")
    module.must(
        rows(left) == rows(right) and columns(left) == columns(right), "the two products of LoHa must have one shape"
    )
    return Part(change=LoHa(left, right, module.config.ranks.scale_of(module.name)))


def lokr(module: Module) -> Part:
    first = _whole(module, "lokr_w1", axes=(2,)) or _product(module, "lokr_w1", "")
    second = _whole(module, "lokr_w2", axes=(2, 3, 4)) or _product(module, "lokr_w2", "lokr_t2")
    return Part(change=LoKr(first, second, module.config.ranks.scale_of(module.name)))


def _whole(module: Module, name: str, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """One array, or nothing where there are factors."""
    if not module.has(name):
        return ()
    whole = module.tensor(name)
    module.must(whole.ndim in axes and whole.size > 0, f"{name} must have {' or '.join(map(str, axes))} axes")
    factors = {f"{name}_a", f"{name}_b", name.replace("_w", "_t")} & set(module.tensors)
    module.must(not factors, f"{name} must be whole, or made of factors")
    return (whole,)


def _product(module: Module, name: str, core: str) -> tuple[Array, ...]:
    """Two factors; with a core, by the modes of a kernel (`use_effective_conv2d`)."""
    w_a, w_b = module.tensor(f"{name}_a", 2), module.tensor(f"{name}_b", 2)
    _check_rank(module, len(w_b))
    module.must(w_a.size > 0 and w_b.size > 0, f"the factors of {name} must hold something")
    if not module.has(core):
        module.must(w_a.shape[1] == len(w_b), f"the factors of {name} must fit")
        return w_a, w_b
    values = module.tensor(core, 4)
    module.must(values.shape[:2] == (len(w_a), len(w_b)) and values.size > 0, f"the factors of {core} must fit")
    return values, w_a, w_b


def _check_rank(module: Module, found: int) -> None:
    rank = module.config.ranks.rank_of(module.name)
    module.must(found == rank, f"the rank must be {rank} by adapter_config.json, and is {found}")


def vera(module: Module) -> Part:
    a, b = module.tensor("vera_A", 2), module.tensor("vera_B", 2)
    by_rank, by_output = module.vector("vera_lambda_d"), module.vector("vera_lambda_b")
    module.must(len(a) == b.shape[1] == by_rank.size, f"VeRA's projections {a.shape}, {b.shape} must be of its rank")
    return Part(change=VeRA(a, b, by_rank, by_output))


def pvera(module: Module) -> Part:
    """The mean of what PVeRA samples in training: the first half of A."""
    module.must(not module.config.fields.get("sample_at_inference"), "sample_at_inference makes every run another one")
    a, b = module.tensor("pvera_A", 2), module.tensor("pvera_B", 2)
    by_rank, by_output = module.vector("pvera_lambda_d"), module.vector("pvera_lambda_b")
    rank = b.shape[1]
    module.must(len(a) == by_rank.size == 2 * rank, f"PVeRA's projections {a.shape}, {b.shape} must be of its rank")
    return Part(change=VeRA(a[:rank], b, by_rank[:rank], by_output, "PVeRA"))


def vblora(module: Module) -> Part:
    bank, count = module.tensor("vblora_vector_bank", 2), module.count("topk")
    (chosen_a, share_a), (chosen_b, share_b) = (_shares(module, f"vblora_logits_{side}", bank, count) for side in "AB")
    rank = len(chosen_a)
    module.must(
        rank == chosen_b.shape[1] == module.config.ranks.rank, "the factors of VB-LoRA must be of the config's r"
    )
    return Part(change=VBLoRA(bank, chosen_a, share_a, chosen_b, share_b))


def _shares(module: Module, name: str, bank: Array, count: int) -> tuple[Array, Floats]:
    """The vectors of the bank that count, and how much of each: the softmax of the largest logits."""
    if module.has(name):
        logits = wide(module.tensor(name, 3))
        module.must(
            logits.size > 0 and logits.shape[2] == len(bank) >= count,
            f"{name} must have a logit for each of {len(bank)} vectors",
        )
        found = [_largest(part, count) for part in logits]  # one at a time, for the memory it takes
        module.must(
            all(told for _, _, told in found),
            f"{name} has equal logits where only the largest {count} count, and does not tell which do",
        )
        return np.stack([chosen for chosen, _, _ in found]), np.stack([share for _, share, _ in found])
    chosen, first = (
        module.tensor(f"{name}_topk_indices", 3).astype(np.int64),
        wide(module.tensor(f"{name}_topk_weights", 3)),
    )
    module.must(
        chosen.shape == (*first.shape[:2], count) and first.shape[2] == count - 1 and chosen.size > 0,
        f"{name} must have {count} vectors, and the shares of all but the last",
    )
    alone = np.sort(chosen, axis=2)
    module.must(
        chosen.min() >= 0 and chosen.max() < len(bank) and not bool((alone[..., 1:] == alone[..., :-1]).any()),
        f"{name}'s vectors must be of the bank's {len(bank)}, each once",
    )
    shares = np.concatenate([first, 1 - first.sum(axis=2, keepdims=True)], axis=2)
    module.must(
        bool((shares >= 0).all()), f"{name}'s shares must be of one whole, and PEFT makes NaN of a negative one"
    )
    return chosen, shares


def _largest(logits: Floats, count: int) -> tuple[NDArray[np.intp], Floats, bool]:
    """Of `[n, vectors]`: the places of the largest, their softmax, and whether the last of them is larger than the
    next."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, : count + 1]
    ranked = np.take_along_axis(logits, order, axis=1)
    told = ranked.shape[1] == count or bool((ranked[:, -2] > ranked[:, -1]).all())
    powers = np.exp(ranked[:, :count] - ranked[:, :1])
    return order[:, :count], powers / powers.sum(axis=1, keepdims=True), told


def randlora(module: Module) -> Part:
    """PEFT writes the shared bases for every module once more."""
    a, b = (_shared(module, f"randlora_{side}") for side in "AB")
    by_rank, by_small = module.tensor("randlora_lambda", 2), module.tensor("randlora_gamma", 2)
    rank, bases = by_rank.shape
    module.must(
        rank == module.config.ranks.rank == len(a) == b.shape[2] and a.shape[1] == 1 and len(by_small) == bases,
        f"RandLoRA's bases {a.shape}, {b.shape} must be of its rank {module.config.ranks.rank}",
    )
    return Part(change=RandLoRA(a, b, by_rank, by_small, module.config.ranks.scale_of(module.name)))


def _shared(module: Module, name: str) -> Array:
    copy, shared = module.tensor(name, 3), module.shared[name]
    module.must(copy is shared or np.array_equal(copy, shared), f"{name} must be the same for all modules")
    return shared


def delora(module: Module) -> Part:
    """Every rank with its norm taken out, inputs by the norms of the base. DeLoRA (Bini et al. 2025), equation 8."""
    a, b = wide(module.tensor("delora_A", 2)), wide(module.tensor("delora_B", 2))
    strength, norms = module.vector("delora_lambda"), wide(module.vector("delora_w_norm"))
    _check_rank(module, len(a))
    module.must(strength.size == 1 and norms.size == a.shape[1] and b.shape[1] == len(a), "DeLoRA's tensors must fit")
    of_a, of_b = (np.maximum(np.linalg.norm(part, axis=axis), 1e-4) for part, axis in ((a, 1), (b, 0)))
    by_rank = wide(strength)[0] / len(a) / (of_a * of_b)
    return Part(Delta(a * norms, b * by_rank, 1.0))


def gralora(module: Module) -> Part:
    a, b, blocks = module.tensor("gralora_A", 3), module.tensor("gralora_B", 3), module.count("gralora_k")
    rank, hybrid = module.config.ranks.rank, module.count("hybrid_r", least=0)
    module.must(
        len(a) == len(b) == blocks and a.shape[2] == b.shape[1] == rank and rank % blocks == 0,
        f"GraLoRA must have {blocks} blocks of rank {rank}, a multiple of that",
    )
    general: tuple[Array, ...] = ()
    if hybrid:
        general = module.tensor("gralora_A_general", 2), module.tensor("gralora_B_general", 2)
        module.must(
            general[0].shape == (hybrid, blocks * a.shape[1]) and general[1].shape == (blocks * b.shape[2], hybrid),
            f"GraLoRA must have a general pair of rank {hybrid}",
        )
    return Part(change=GraLoRA(a, b, general, module.config.ranks.alpha / (rank + hybrid)))


def miss(module: Module) -> Part:
    form = module.config.fields.get("init_weights", True)
    module.must(form in (True, False, None, "bat", "mini"), f"init_weights {shown(form)} of MiSS is not known here")
    rank = module.config.ranks.rank
    if form == "bat":
        block = module.tensor("miss_block", 3)
        module.must(block.shape[1:] == (rank, rank), f"MiSS must have blocks of the config's r, {rank}")
        return Part(change=MiSS(block, "bat"))
    block = module.tensor("miss_block", 2)
    module.must(len(block) == rank and block.size > 0, f"MiSS must have a block of the config's r, {rank}")
    if form == "mini":
        module.must(block.shape[1] == module.count("mini_r"), "MiSS must have a block of the config's mini_r")
    return Part(change=MiSS(block, "mini" if form == "mini" else "plain"))
