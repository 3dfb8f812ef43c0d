"""MLX's adapter folders, as mlx-lm writes them: which module and which factor each tensor's name means, and which scale
the folder means.

The references are mlx-lm 0.32 and its older versions: `tuner/lora.py`, `tuner/dora.py`, `tuner/utils.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.adapters.adapter import Adapter, Delta, MatrixDelta, Origin, Replacement
from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.files.npz_file import read_npz
from onnx_lora.adapters.formats.files.reading import TensorFile, open_reading
from onnx_lora.adapters.formats.files.safetensors_file import read_safetensors
from onnx_lora.adapters.formats.mlx.names import CONFIG, NPZ, WEIGHTS
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.json_file import read_json
from onnx_lora.points import Array

__all__ = ["read_mlx"]

_TENSORS = ("lora_a", "lora_b", "m")

_LARGEST = 1e30  # no scale and no alpha is larger

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


def read_mlx(folder: Path, name: str) -> Adapter:
    """The scale is the config's `scale` as it is; until mlx-lm 0.14, times alpha / r.

    `lora_a` `[in, r]`, `lora_b` `[r, out]`, of DoRA `m` `[out]`; with `fine_tune_type: full` whole parameters.

    Raises AdapterFileError: a file is missing or damaged, or they disagree. UnsupportedAdapterError: what is refused,
    and a scale that the folder does not tell.
    """
    weights = _find_weights(folder)
    if not (folder / CONFIG).is_file():
        raise UnsupportedAdapterError(
            f"has no {CONFIG}, and without it the scale is unknown: put one beside {weights.name}, such as "
            '{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}, with the numbers of the '
            "training (where they were not set, the scale was 20)",
            path=folder,
        )
    config = _read_config(folder / CONFIG)
    content = _read_tensors(weights)
    builder = AdapterBuilder()
    values = builder.floats(content.tensors)
    if config.kind == "full":
        _take_whole(builder, values)
    else:
        _take_factors(builder, values, config)
    return builder.adapter(name, Origin(str(folder), content.sha256, "mlx", "", config.model))


def _find_weights(folder: Path) -> Path:
    """The file of tensors. Raises AdapterFileError: there is none."""
    for name in (WEIGHTS, NPZ):
        if (folder / name).is_file():
            return folder / name
    raise AdapterFileError(f"must hold {WEIGHTS} (or {NPZ}), and does not", path=folder)


def _read_tensors(weights: Path) -> TensorFile:
    with open_reading(weights) as file:
        return read_npz(file) if weights.name == NPZ else read_safetensors(file)


def _read_config(path: Path) -> _Config:
    """Raises AdapterFileError: damaged. UnsupportedAdapterError: an unknown method, or a scale that is not told."""
    fields = read_json(path, AdapterFileError)
    kind = fields.get("fine_tune_type")
    if not kind:
        kind = "dora" if fields.get("use_dora") else "lora"
    if kind not in ("lora", "dora", "full"):
        raise UnsupportedAdapterError(f"fine_tune_type {abbreviate(kind)} is not known here", path=path)
    named = fields.get("model")
    model = named if isinstance(named, str) else ""
    if kind == "full":
        return _Config(kind, 0, 1.0, model)
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterFileError("must hold lora_parameters with rank and scale, and does not", path=path)
    rank = parameters.get("rank")
    scale = _finite_number(parameters.get("scale"))
    if type(rank) is not int or rank < 1 or scale is None:
        raise AdapterFileError(
            f"lora_parameters must have a rank of at least 1 and a scale, and has "
            f"{abbreviate(rank)} and {abbreviate(parameters.get('scale'))}",
            path=path,
        )
    return _Config(kind, rank, _scale(fields, scale, parameters.get("alpha"), rank, path), model)


def _scale(fields: Mapping[str, Any], scale: float, alpha: object, rank: int, path: Path) -> float:
    """The scale that the factors are multiplied with: the config's, which mlx-lm multiplied with alpha / r until 0.14.

    The fields tell its versions apart: `use_dora` came with 0.13.1, and 0.19 has `fine_tune_type` in its place.
    """
    if alpha is None or "fine_tune_type" in fields:
        return scale
    number = _finite_number(alpha)
    if number is None:
        raise AdapterFileError(f"alpha of lora_parameters must be a number, and is {abbreviate(alpha)}", path=path)
    factor = lora_scale(number, rank)
    if "use_dora" in fields and factor != 1:
        raise UnsupportedAdapterError(_BEFORE.format(scale=scale * factor), path=path)
    return scale * factor


def _finite_number(value: object) -> float | None:
    """A number of JSON as a float; None: it is no number, or too large a one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < _LARGEST else None


def _take_factors(builder: AdapterBuilder, tensors: Mapping[str, Array], config: _Config) -> None:
    modules: dict[str, dict[str, Array]] = {}
    for key, values in tensors.items():
        module, _, tensor = key.rpartition(".")
        if tensor not in _TENSORS or not module:
            builder.problems.append(f"{key}: must end with .lora_a, .lora_b or .m, as mlx-lm names its tensors")
        else:
            modules.setdefault(module, {})[tensor] = values
    for module, own in modules.items():
        with builder.reading(module):
            _put(builder, module, own, config)


def _put(builder: AdapterBuilder, module: str, tensors: Mapping[str, Array], config: _Config) -> None:
    """Raises TensorError: not the tensors, or not the shapes, that the config says."""
    wanted = {"lora_a", "lora_b", "m"} if config.kind == "dora" else {"lora_a", "lora_b"}
    if set(tensors) != wanted:
        raise TensorError(f"must have {', '.join(sorted(wanted))} by {CONFIG}, and has {', '.join(sorted(tensors))}")
    a, b = tensors["lora_a"], tensors["lora_b"]
    if a.ndim == 3 or b.ndim == 3:
        builder.unsupported.append(
            f"{module}: has factors for each expert of a mixture ({a.shape}, {b.shape}), which are not applied; train "
            "without the switch layers"
        )
        return
    are_matrices = a.ndim == 2 and b.ndim == 2 and a.size > 0 and b.size > 0
    if not are_matrices or a.shape[1] != config.rank or len(b) != config.rank:
        raise TensorError(
            f"lora_a and lora_b must be [in, {config.rank}] and [{config.rank}, out] by {CONFIG}, and have "
            f"shapes {a.shape} and {b.shape}"
        )
    if config.kind == "dora":
        # An embedding has a magnitude for each row of the table in MLX: bind refuses this delta there.
        builder.put_delta(module, Delta(a.T, b.T, config.scale, magnitude=tensors["m"]))
        return
    # The tensors of an embedding look the same. mlx-lm's `as_linear` applies those to a tied head, too.
    builder.put_delta(module, MatrixDelta(a.T, b.T, config.scale))
    builder.with_tied_heads.add(module)


def _take_whole(builder: AdapterBuilder, tensors: Mapping[str, Array]) -> None:
    """`fine_tune_type: full`: the parameters themselves."""
    for key, values in tensors.items():
        module, _, parameter = key.rpartition(".")
        if not module or parameter in ("scales", "biases", *_TENSORS):
            builder.unsupported.append(
                f"{key}: is no whole parameter; full fine-tuning of a quantized base is not applied"
            )
        elif values.ndim > 2:
            builder.unsupported.append(f"{key}: is a kernel, or of experts, whose axes MLX orders otherwise")
        else:
            builder.put_replacement(key, Replacement(values, in_place=True))
