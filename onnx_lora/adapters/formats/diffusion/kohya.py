"""Kohya's single files (A1111, ComfyUI) and LyCORIS': which tensor of which module each name means. The modules' names
are flat, `_` for `.`; which module of a package one is, `names.py` finds out.

A missing alpha means the rank: scale 1. The reference is sd-scripts' `networks/lora.py`, and LyCORIS 4.1."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Change, Replacement
from onnx_lora.adapters.formats.collected import Collected, alpha_of, as_matrix, two_factors
from onnx_lora.adapters.formats.diffusion.lycoris import Difference, ModuleError, Product, decomposed, loha, lokr
from onnx_lora.adapters.formats.diffusion.sgm import from_sgm
from onnx_lora.adapters.formats.files.reading import TensorFile
from onnx_lora.points import Array

__all__ = ["COMPONENTS", "is_kohya", "read_kohya"]

# What stands before a module's name, by the part of a pipeline; LyCORIS' own has no parts.
COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}

# Numbers in a kernel `[r, in, *kernel]`: 256 MB, where the largest published have 10.
_LARGEST = 2**26

# Some converters put every dot of diffusers' names into `_`, this one too.
_FACTOR = re.compile(r"(?<=[^.])_(lora_down|lora_up)\.weight$")

_LORA = frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"})
_LOHA = frozenset(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_WHOLE = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}

# Tensors of methods that are known and refused; the first that matches the end of a key counts.
_REFUSED = {
    "oft_blocks": "OFT or BOFT of LyCORIS, which rotates outputs",
    "oft_diag": "OFT of LyCORIS, which rotates outputs",
    "rescale": "OFT of LyCORIS, which rotates outputs",
    "on_input": "(IA)^3 of LyCORIS",
    "lambda_layer": "T-LoRA, which changes from step to step",
    "q_layer.weight": "T-LoRA, which changes from step to step",
    "p_layer.weight": "T-LoRA, which changes from step to step",
    "set_weight": "a whole weight of ComfyUI",
    "reshape_weight": "a weight that ComfyUI reshapes",
    "scalar": "a factor that LyCORIS had not multiplied in when it saved",
} | {f"{name}.weight": "GLoRA of LyCORIS" for name in ("a1", "a2", "b1", "b2", "bm")}
_CURE = "merge it into the model with the tool that made it, and export that"


def is_kohya(names: Iterable[str]) -> bool:
    """Whether tensors have such names."""
    return any(name.startswith(tuple(COMPONENTS)) for name in names)


def read_kohya(file: TensorFile, path: Path, name: str) -> Adapter:
    """Raises AdapterFileError: damaged, or names that are not kohya's. UnsupportedAdapterError: a method that is
    refused."""
    collected = Collected()
    modules: dict[str, dict[str, Array]] = {}
    for key, values in file.tensors.items():
        flat, _, tensor = _FACTOR.sub(r".\1.weight", key).partition(".")
        module = _module(flat)
        if module is None:
            collected.problems.append(f"{key}: must begin with {', '.join(COMPONENTS)}, as kohya names its tensors")
        else:
            own = modules.setdefault(module, {})
            if tensor in own:
                collected.problems.append(f"{key}: there are two names for {tensor} of {module}")
            own[tensor] = values
    for module, tensors in modules.items():
        try:
            _take(collected, module, tensors)
        except ModuleError as error:
            collected.problems.append(f"{module}: {error}")
    base = file.metadata.get("ss_sd_model_name", "")
    return collected.adapter(path, name, format="kohya", base_model=base, flat_names=True, sha256=file.sha256)


def _module(flat: str) -> str | None:
    """`lora_unet_input_blocks_4_1_proj_in` as `unet.down_blocks.1.attentions.0.proj_in`, flat what is not known."""
    for prefix, component in COMPONENTS.items():
        rest = flat.removeprefix(prefix)
        if flat.startswith(prefix) and rest:
            known = from_sgm(rest) if component == "unet" else None
            return f"{component}.{known or rest}" if component else rest
    return None


def _take(collected: Collected, module: str, tensors: dict[str, Array]) -> None:
    """Raises ModuleError."""
    refused = [(tensor, _REFUSED[tensor]) for tensor in tensors if tensor in _REFUSED]
    if refused:
        collected.unsupported += [f"{module}, {tensor}: {reason} is not applied; {_CURE}" for tensor, reason in refused]
        return
    alpha = _alpha(tensors)
    values = collected.floats({tensor: values for tensor, values in tensors.items() if tensor != "alpha"})
    whole = {tensor: values.pop(tensor) for tensor in _WHOLE if tensor in values}
    dora = values.pop("dora_scale", None)
    kinds = [kind for kind in (_LORA, _LOHA, _LOKR) if kind & set(values)]
    unknown = set(values) - frozenset().union(*kinds)
    if unknown or len(kinds) > 1 or (not kinds and not whole):
        raise ModuleError(
            f"its tensors {', '.join(sorted(tensors))} are none of a method known here; upgrade onnx-lora"
        )
    for tensor in whole:
        _put_whole(collected, module, tensor, whole[tensor], alone=not kinds)
    if kinds == [_LORA]:
        _put_lora(collected, module, values, alpha, dora)
    elif kinds:
        change: Change = loha(values, alpha) if kinds == [_LOHA] else lokr(values, alpha)
        if dora is not None:
            change = decomposed(change, dora)
        collected.put_change(module, change, values if dora is None else values | {"dora_scale": dora})
    elif dora is not None:
        raise ModuleError("has dora_scale, and no factors")


def _alpha(tensors: Mapping[str, Array]) -> float | None:
    """Raises ModuleError."""
    if "alpha" not in tensors:
        return None
    alpha = alpha_of(tensors["alpha"])
    if isinstance(alpha, str):
        raise ModuleError(alpha)
    return alpha


def _put_whole(collected: Collected, module: str, tensor: str, values: Array, *, alone: bool) -> None:
    """A difference of a matrix or a kernel is a change of the module; of a norm or a bias it adds to the parameter."""
    parameter = _WHOLE[tensor]
    if parameter == "weight" and not alone:
        raise ModuleError(f"has both {tensor} and factors, and which comes first is not told")
    changed = parameter == "weight" and module in collected.changes
    if changed or f"{module}.{parameter}" in collected.replacements:
        raise ModuleError(f"has two tensors for its {parameter}, {tensor} the second")
    if values.ndim < 2:
        collected.replacements[f"{module}.{parameter}"] = Replacement(values, operation="add")
        collected.methods.add("full difference")
    else:
        collected.put_change(module, Difference(values), {tensor: values})


def _put_lora(
    collected: Collected, module: str, tensors: Mapping[str, Array], alpha: float | None, dora: Array | None
) -> None:
    missing = [f"lora_{side}.weight" for side in ("down", "up") if f"lora_{side}.weight" not in tensors]
    if missing:
        raise ModuleError(f"has no {' and no '.join(missing)}; get the whole file")
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    if "lora_mid.weight" in tensors:
        down = _with_core(down, tensors["lora_mid.weight"])
    rank = len(down) if down.ndim else 0
    made = two_factors(down, up, 1.0 if alpha is None or not rank else alpha / rank)
    if isinstance(made, str):
        raise ModuleError(made)
    if dora is None:
        collected.put_delta(module, made)
        return
    change = decomposed(Product(made.a.reshape(rank, -1), made.b, made.scale), dora)
    if change.by_input:
        collected.put_change(module, change, {**tensors, "dora_scale": dora})
    else:
        collected.put_delta(module, replace(made, magnitude=change.magnitude))


def _with_core(down: Array, core: Array) -> Array:
    """LoCon's CP decomposition: `up · core · down`, the core `[r, r, *kernel]`, as a kernel `[r, in, *kernel]`.

    LyCORIS (Yeh et al. 2023), section 3.1. Raises ModuleError.
    """
    matrix = as_matrix(down)
    if matrix is None or core.ndim < 3 or core.shape[1] != len(matrix) or not core.size:
        raise ModuleError(f"lora_mid {core.shape} must have a kernel, and fit lora_down {down.shape}")
    wide = np.promote_types(np.promote_types(core.dtype, matrix.dtype), np.float32)
    if math.prod(core.shape[2:]) * matrix.size > _LARGEST:
        raise ModuleError(f"lora_mid {core.shape} and lora_down {down.shape} make a kernel that no convolution has")
    kernel: Array = np.einsum("mn...,ni->mi...", core.astype(wide), matrix.astype(wide))
    return kernel
