"""Kohya's single files (A1111, ComfyUI) and LyCORIS': which module each tensor's name means, and what the tensors of a
module come to.

The reference is sd-scripts' `networks/lora.py`, and LyCORIS 4.1."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Change, Origin, PortableAdapter, Replacement
from onnx_lora.adapters.formats.builder import AdapterBuilder, alpha_of, as_matrix, two_factors
from onnx_lora.adapters.formats.diffusion.kohya_names import PREFIXES, module_of
from onnx_lora.adapters.formats.diffusion.kohya_writer import write_kohya
from onnx_lora.adapters.formats.diffusion.lycoris import build_loha, build_lokr, decompose
from onnx_lora.adapters.formats.diffusion.lycoris_changes import Difference, Product
from onnx_lora.adapters.formats.files.reading import TensorFile
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.module_names import KnownModules
from onnx_lora.adapters.problems import TensorError
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.package import Package
from onnx_lora.points import Array

__all__ = ["FORMAT", "take_module"]

# Numbers in a kernel `[r, in, *kernel]`: 256 MB, where the largest published have 10.
_LARGEST = 2**26

# Some converters put every dot of diffusers' names into `_`, this one too.
_FACTOR = re.compile(r"(?<=[^.])_(lora_down|lora_up)\.weight$")

# OneTrainer's token embeddings.
_BUNDLE = "bundle_emb."

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


class KohyaFormat:
    name = "kohya"
    ending = ".safetensors"
    row = Row(
        "kohya, A1111, LyCORIS (`.safetensors`)",
        "`lora_unet_`, `lora_te_`, `lora_te1_`, `lora_transformer_`, `lycoris_`",
        "alpha / rank; **without `.alpha` 1**",
        "`oft`, `boft`, T-LoRA, GLoRA",
    )

    def recognises(self, place: Place) -> bool:
        if place.header is None:
            return False
        return any(name.startswith(tuple(PREFIXES)) for name in place.header.names)

    def read(self, place: Place, name: str | None) -> Adapter:
        return _read(place.tensors(), place.path, name or place.default_name)

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        write_kohya(adapter, out, () if package is None else KnownModules.of(package).parts)


FORMAT = KohyaFormat()


def _read(file: TensorFile, path: Path, name: str) -> Adapter:
    """The scale is alpha / r by module; without `.alpha` it is 1. Modules keep their flat names.

    `lora_down` `[r, in]` or `[r, channels, *kernel]`, `lora_up` `[out, r]` with axes of size 1 behind, `lora_mid`
    `[r, r, *kernel]`; LyCORIS' tensors are described in `lycoris.py`.

    Raises AdapterFileError: damaged, or names that are not kohya's. UnsupportedAdapterError: a method that is refused.
    """
    builder = AdapterBuilder()
    for module, tensors in _modules(builder, file.tensors).items():
        with builder.reading(module):
            take_module(builder, module, tensors)
    base_model = file.metadata.get("ss_sd_model_name", "")
    return builder.adapter(name, Origin(str(path), file.sha256, "kohya", "", base_model), flat_names=True)


def _modules(builder: AdapterBuilder, tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """The file's tensors by module and name."""
    modules: dict[str, dict[str, Array]] = {}
    for key, values in tensors.items():
        flat, _, tensor = _FACTOR.sub(r".\1.weight", key).partition(".")
        module = module_of(flat)
        if key.startswith(_BUNDLE):
            builder.unsupported.append(
                f"{key}: is a trained token that OneTrainer put in, which changes prompts; save the file again without "
                "bundled embeddings, and load those beside the tokenizer"
            )
            continue
        if module is None:
            builder.problems.append(f"{key}: must begin with {', '.join(PREFIXES)}, as kohya names its tensors")
            continue
        own = modules.setdefault(module, {})
        if tensor in own:
            builder.problems.append(f"{key}: there are two names for {tensor} of {module}")
        own[tensor] = values
    return modules


@dataclass(frozen=True)
class _Module:
    """A module's tensors by what they do. `factors`: of a method. `whole`: differences of a parameter. `alpha` and
    `dora`: None where the file has none."""

    name: str
    factors: Mapping[str, Array]
    whole: Mapping[str, Array]
    alpha: float | None
    dora: Array | None


def take_module(builder: AdapterBuilder, name: str, tensors: Mapping[str, Array]) -> None:
    """Put in what a module's tensors come to, by kohya's names. Raises TensorError: they make no sense together."""
    refused = [tensor for tensor in tensors if tensor in _REFUSED]
    if refused:
        for tensor in refused:
            builder.unsupported.append(f"{name}, {tensor}: {_REFUSED[tensor]} is not applied; {_CURE}")
        return
    module = _sort(builder, name, tensors)
    method = _find_method(module)
    holds_something = method is not None or module.whole
    if not holds_something or not module.factors.keys() <= (method or frozenset()):
        raise TensorError(
            f"its tensors {', '.join(sorted(tensors))} are none of a method known here; upgrade onnx-lora"
        )
    for tensor, values in module.whole.items():
        _put_whole(builder, name, tensor, values, has_factors=method is not None)
    if method is _LORA:
        _put_lora(builder, module)
    elif method is _LOHA:
        _put_change(builder, module, build_loha(module.factors, module.alpha))
    elif method is _LOKR:
        _put_change(builder, module, build_lokr(module.factors, module.alpha))
    elif module.dora is not None:
        raise TensorError("has dora_scale, and no factors")


def _find_method(module: _Module) -> frozenset[str] | None:
    """The names of the tensors of the first method that the module has a tensor of; None: it has factors of none."""
    for method in (_LORA, _LOHA, _LOKR):
        if not method.isdisjoint(module.factors):
            return method
    return None


def _sort(builder: AdapterBuilder, name: str, tensors: Mapping[str, Array]) -> _Module:
    """Raises TensorError: an alpha that is no number."""
    alpha = alpha_of(tensors["alpha"]) if "alpha" in tensors else None
    others = {tensor: values for tensor, values in tensors.items() if tensor != "alpha"}
    factors = builder.floats(others)
    whole: dict[str, Array] = {}
    for tensor in _WHOLE:
        if tensor in factors:
            whole[tensor] = factors.pop(tensor)
    dora = factors.pop("dora_scale", None)
    return _Module(name, factors, whole, alpha, dora)


def _put_whole(builder: AdapterBuilder, module: str, tensor: str, values: Array, *, has_factors: bool) -> None:
    """A difference of a matrix or a kernel is a change of the module; of a norm or a bias it adds to the parameter.

    Raises TensorError: the module's weight, or its bias, is changed by another tensor too.
    """
    parameter = _WHOLE[tensor]
    if parameter == "weight" and has_factors:
        raise TensorError(f"has both {tensor} and factors, and the file does not say which of them comes first")
    is_changed = parameter == "weight" and module in builder.changes
    if is_changed or f"{module}.{parameter}" in builder.replacements:
        raise TensorError(f"has two tensors for its {parameter}, {tensor} the second")
    if values.ndim < 2:
        builder.put_replacement(f"{module}.{parameter}", Replacement(values, operation="add"))
        builder.methods.add("full difference")
    else:
        builder.put_change(module, Difference(values), {tensor: values})


def _put_change(builder: AdapterBuilder, module: _Module, change: Change) -> None:
    """Raises TensorError: a `dora_scale` of an impossible shape."""
    if module.dora is None:
        builder.put_change(module.name, change, module.factors)
    else:
        tensors = {**module.factors, "dora_scale": module.dora}
        builder.put_change(module.name, decompose(change, module.dora), tensors)


def _put_lora(builder: AdapterBuilder, module: _Module) -> None:
    """Raises TensorError: a factor is missing, or they do not fit each other."""
    missing = [name for name in ("lora_down.weight", "lora_up.weight") if name not in module.factors]
    if missing:
        raise TensorError(f"has no {' and no '.join(missing)}; get the whole file")
    down, up = module.factors["lora_down.weight"], module.factors["lora_up.weight"]
    if "lora_mid.weight" in module.factors:
        down = _with_core(down, module.factors["lora_mid.weight"])
    rank = len(down) if down.ndim else 0
    scale = 1.0
    if module.alpha is not None and rank > 0:
        scale = lora_scale(module.alpha, rank)
    delta = two_factors(down, up, scale)
    if module.dora is None:
        builder.put_delta(module.name, delta)
        return
    product = Product(delta.a.reshape(rank, -1), delta.b, delta.scale)
    change = decompose(product, module.dora)
    if change.by_input:
        builder.put_change(module.name, change, {**module.factors, "dora_scale": module.dora})
    else:
        builder.put_delta(module.name, replace(delta, magnitude=change.magnitude))


def _with_core(down: Array, core: Array) -> Array:
    """The product of a core `[r, r, *kernel]` and of `lora_down` `[r, in]`, a kernel `[r, in, *kernel]`, which is A in
    LoCon's CP decomposition `up · core · down`.

    LyCORIS (Yeh et al. 2023), section 3.1. Raises TensorError: the two do not fit, or the kernel is too large.
    """
    matrix = as_matrix(down)
    is_core = core.ndim >= 3 and core.size > 0
    if matrix is None or not is_core or core.shape[1] != len(matrix):
        raise TensorError(f"lora_mid {core.shape} must have a kernel, and fit lora_down {down.shape}")
    wide = np.result_type(core.dtype, matrix.dtype, np.float32)
    if math.prod(core.shape[2:]) * matrix.size > _LARGEST:
        raise TensorError(f"lora_mid {core.shape} and lora_down {down.shape} make a kernel that no convolution has")
    kernel: Array = np.einsum("mn...,ni->mi...", core.astype(wide), matrix.astype(wide))
    return kernel
