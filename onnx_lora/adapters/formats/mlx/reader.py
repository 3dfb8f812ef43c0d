"""MLX's adapter folders, as mlx-lm writes them: which tensor of which module each name means, and what scale.

The references are mlx-lm 0.32 and its older versions: `tuner/lora.py`, `tuner/dora.py`, `tuner/utils.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.adapters.adapter import Adapter, Delta, MatrixDelta, Replacement
from onnx_lora.adapters.formats.collected import Collected
from onnx_lora.adapters.formats.files.npz import read_npz
from onnx_lora.adapters.formats.files.reading import opened, read_json, shown
from onnx_lora.adapters.formats.files.safetensors import read_safetensors
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.points import Array

__all__ = ["CONFIG", "NPZ", "WEIGHTS", "is_mlx_config", "read_mlx"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
NPZ = "adapters.npz"

_TENSORS = ("lora_a", "lora_b", "m")

_BEFORE = (
    "lora_parameters has an alpha, which mlx-lm multiplied in (scale · alpha / rank) until 0.14 and ignores since "
    "0.15, and the file does not say which of them wrote it: take alpha out if it was 0.15 or newer, else take it out "
    "and set scale to {scale:g}"
)


@dataclass(frozen=True)
class _Config:
    """What counts of a config. `rank` and `scale` of a full fine-tuning are 0 and 1."""

    kind: str  # "lora", "dora" or "full"
    rank: int
    scale: float
    model: str


def is_mlx_config(path: Path) -> bool:
    """Whether an `adapter_config.json` is mlx-lm's. Anything that cannot be read is not."""
    try:
        fields = read_json(path)
    except AdapterFileError:
        return False
    return "peft_type" not in fields and bool({"fine_tune_type", "lora_parameters", "lora_layers"} & set(fields))


def read_mlx(folder: Path, name: str) -> Adapter:
    """Raises AdapterFileError: a file is missing or damaged, or they disagree. UnsupportedAdapterError: what is
    refused, and a scale that is not told."""
    weights = next((folder / own for own in (WEIGHTS, NPZ) if (folder / own).is_file()), None)
    if weights is None:
        raise AdapterFileError(f"must hold {WEIGHTS} (or {NPZ}), and does not", path=folder)
    if not (folder / CONFIG).is_file():
        raise UnsupportedAdapterError(
            f"has no {CONFIG}, and without it the scale is unknown: put one beside {weights.name}, such as "
            '{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}, with the numbers of the '
            "training (where they were not set, the scale was 20)",
            path=folder,
        )
    config = _config(folder / CONFIG)
    with opened(weights) as file:
        content = read_npz(file) if weights.name == NPZ else read_safetensors(file)
    collected = Collected()
    values = collected.floats(content.tensors)
    if config.kind == "full":
        _take_whole(collected, values)
    else:
        _take_factors(collected, values, config)
    return collected.adapter(folder, name, format="mlx", base_model=config.model, sha256=content.sha256)


def _config(path: Path) -> _Config:
    fields = read_json(path)
    kind = fields.get("fine_tune_type") or ("dora" if fields.get("use_dora") else "lora")
    if kind not in ("lora", "dora", "full"):
        raise UnsupportedAdapterError(f"fine_tune_type {shown(kind)} is not known here", path=path)
    named = fields.get("model")
    model = named if isinstance(named, str) else ""
    if kind == "full":
        return _Config(kind, 0, 1.0, model)
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterFileError("must hold lora_parameters with rank and scale, and does not", path=path)
    rank, scale = parameters.get("rank"), _number(parameters.get("scale"))
    if type(rank) is not int or rank < 1 or scale is None:
        raise AdapterFileError(
            f"lora_parameters must have a rank of at least 1 and a scale, and has "
            f"{shown(rank)} and {shown(parameters.get('scale'))}",
            path=path,
        )
    return _Config(kind, rank, _scale(fields, scale, parameters.get("alpha"), rank, path), model)


def _scale(fields: Mapping[str, Any], scale: float, alpha: object, rank: int, path: Path) -> float:
    """Used as it is; until mlx-lm 0.14, times alpha / rank. `use_dora` came with 0.13.1, and 0.19 has
    `fine_tune_type` in its place."""
    if alpha is None or "fine_tune_type" in fields:
        return scale
    number = _number(alpha)
    if number is None:
        raise AdapterFileError(f"alpha of lora_parameters must be a number, and is {shown(alpha)}", path=path)
    times = number / rank
    if "use_dora" in fields and times != 1:
        raise UnsupportedAdapterError(_BEFORE.format(scale=scale * times), path=path)
    return scale * times


def _number(value: object) -> float | None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if ok else None  # type: ignore[arg-type]


def _take_factors(collected: Collected, tensors: Mapping[str, Array], config: _Config) -> None:
    modules: dict[str, dict[str, Array]] = {}
    for key, values in tensors.items():
        module, _, tensor = key.rpartition(".")
        if tensor not in _TENSORS or not module:
            collected.problems.append(f"{key}: must end with .lora_a, .lora_b or .m, as mlx-lm names its tensors")
        else:
            modules.setdefault(module, {})[tensor] = values
    for module, own in modules.items():
        _put(collected, module, own, config)


def _put(collected: Collected, module: str, tensors: Mapping[str, Array], config: _Config) -> None:
    wanted = {"lora_a", "lora_b", "m"} if config.kind == "dora" else {"lora_a", "lora_b"}
    if set(tensors) != wanted:
        collected.problems.append(
            f"{module}: must have {', '.join(sorted(wanted))} by {CONFIG}, and has {', '.join(sorted(tensors))}"
        )
        return
    a, b = tensors["lora_a"], tensors["lora_b"]
    if a.ndim == 3 or b.ndim == 3:
        collected.unsupported.append(
            f"{module}: has factors for each expert of a mixture ({a.shape}, {b.shape}), which are not applied; train "
            "without the switch layers"
        )
    elif a.ndim != 2 or b.ndim != 2 or a.shape[1] != config.rank or len(b) != config.rank or not a.size or not b.size:
        collected.problems.append(
            f"{module}: lora_a and lora_b must be [in, {config.rank}] and [{config.rank}, out] by {CONFIG}, and have "
            f"shapes {a.shape} and {b.shape}"
        )
    elif config.kind == "lora":
        # Of a linear module or of an embedding, alike: there mlx-lm's `as_linear` applies it to a tied head too.
        collected.put_delta(module, MatrixDelta(a.T, b.T, config.scale))
        collected.with_tied_heads.add(module)
    else:
        # Of an embedding, MLX has a magnitude for each row of the table: bind refuses this delta there.
        collected.put_delta(module, Delta(a.T, b.T, config.scale, magnitude=tensors["m"]))


def _take_whole(collected: Collected, tensors: Mapping[str, Array]) -> None:
    """`fine_tune_type: full`: the parameters themselves."""
    for key, values in tensors.items():
        module, _, parameter = key.rpartition(".")
        if not module or parameter in ("scales", "biases", *_TENSORS):
            collected.unsupported.append(
                f"{key}: is no whole parameter; full fine-tuning of a quantized base is not applied"
            )
        elif values.ndim > 2:
            collected.unsupported.append(f"{key}: is a kernel, or of experts, whose axes MLX orders otherwise")
        else:
            collected.replacements[key] = Replacement(values, in_place=True)
