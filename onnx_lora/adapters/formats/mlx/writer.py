"""MLX's adapter folder out of an adapter. All modules have one rank and one scale there: factors of a smaller rank are
filled up with zeros, and what another scale is more or less than the common one goes into B."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.formats.mlx.names import CONFIG, WEIGHTS
from onnx_lora.adapters.formats.writing import dora_problems, refuse_writing, rescale, save_safetensors
from onnx_lora.kinds import Conv, Embedding
from onnx_lora.points import Array

__all__ = ["write_mlx"]

# A layer's number, and what is in front. mlx-lm's `keys` name modules within a layer, or outside of all.
_LAYER = re.compile(r"^.*?\.(?:layers|h|blocks)\.\d+\.")


def write_mlx(adapter: PortableAdapter, folder: Path) -> None:
    """Write the folder, which must not exist.

    Raises UnsupportedAdapterError: whole weights, convolutions, embeddings.
    """
    problems = [f"{name}: is a whole weight beside factors" for name in adapter.replacements]
    for module, delta in adapter.deltas.items():
        if isinstance(delta.kind, Conv):
            problems.append(f"{module}: is a convolution")
        if isinstance(delta.kind, Embedding):
            problems.append(f"{module}: is a table, whose change mlx-lm applies to an output head tied to it as well")
    refuse_writing(adapter, "an adapter folder of MLX", [*problems, *dora_problems(adapter.deltas)])
    deltas = adapter.deltas
    rank = max(delta.rank for delta in deltas.values())
    scales = [delta.scale for delta in deltas.values()]
    scale = max(scales, key=scales.count)
    tensors: dict[str, Array] = {}
    keys: set[str] = set()
    has_dora = False
    for module, delta in deltas.items():
        keys.add(_LAYER.sub("", module))
        has_dora = has_dora or delta.magnitude is not None
        for name, values in _tensors(delta, rank, scale).items():
            tensors[f"{module}.{name}"] = values
    config = {
        "fine_tune_type": "dora" if has_dora else "lora",
        "model": adapter.origin.base_model,
        # All of them: a layer that the file has nothing for stays as it is.
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", "utf-8")
    save_safetensors(folder / WEIGHTS, tensors, {"format": "mlx"})


def _tensors(delta: Delta, rank: int, scale: float) -> dict[str, Array]:
    """`lora_a` `[in, rank]` and `lora_b` `[rank, out]`, filled up with zeros, and of DoRA `m` `[out]`."""
    scaled = rescale(delta, scale)
    missing = rank - scaled.rank
    tensors = {
        "lora_a": np.pad(scaled.a.T, ((0, 0), (0, missing))),
        "lora_b": np.pad(scaled.b.T, ((0, missing), (0, 0))),
    }
    if scaled.magnitude is not None:
        tensors["m"] = scaled.magnitude
    return tensors
