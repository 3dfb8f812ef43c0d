"""An adapter as a file or a folder of any format that is known here. It knows which writer each has, and no format's
inside."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, PortableAdapter
from onnx_lora.adapters.binding import bind
from onnx_lora.adapters.formats.converted.files import write_bound
from onnx_lora.adapters.formats.diffusion.diffusers_writer import write_diffusers
from onnx_lora.adapters.formats.diffusion.kohya_writer import write_kohya
from onnx_lora.adapters.formats.gguf.writer import write_gguf
from onnx_lora.adapters.formats.mlx.writer import write_mlx
from onnx_lora.adapters.formats.peft.writer import write_peft
from onnx_lora.adapters.model_config import config_of
from onnx_lora.adapters.module_names import KnownModules
from onnx_lora.adapters.portable import make_portable
from onnx_lora.boundary import public
from onnx_lora.errors import InputError
from onnx_lora.package import Package
from onnx_lora.staging import staged_place

__all__ = ["FORMATS", "AdapterFormat", "write_adapter"]

AdapterFormat = Literal["peft", "safetensors", "onnx_adapter", "diffusers", "kohya", "mlx", "gguf"]


def _gguf(adapter: PortableAdapter, place: Path, package: Package | None) -> None:
    write_gguf(adapter, place, {} if package is None else config_of(package))


def _kohya(adapter: PortableAdapter, place: Path, package: Package | None) -> None:
    write_kohya(adapter, place, () if package is None else KnownModules.of(package).parts)


# Writers of adapters that are tied to no graph.
_WRITERS: Mapping[str, Callable[[PortableAdapter, Path, Package | None], None]] = {
    "peft": lambda adapter, place, _: write_peft(adapter, place),
    "diffusers": lambda adapter, place, _: write_diffusers(adapter, place),
    "kohya": _kohya,
    "mlx": lambda adapter, place, _: write_mlx(adapter, place),
    "gguf": _gguf,
}

# Every format, by what the names of its files end with; a folder has nothing. The first of an ending is meant where
# nothing else is said.
FORMATS: Mapping[AdapterFormat, str] = {
    "safetensors": ".safetensors",
    "onnx_adapter": ".onnx_adapter",
    "peft": "",
    "diffusers": ".safetensors",
    "kohya": ".safetensors",
    "mlx": "",
    "gguf": ".gguf",
}


@public
def write_adapter(
    adapter: Adapter | BoundAdapter,
    out: str | os.PathLike[str],
    *,
    format: AdapterFormat,
    package: Package | None = None,
) -> Path:
    """Write an adapter, or a bound one (a blend), to `out`, whole or not at all.

    `package`: needed for "safetensors", "onnx_adapter" and "gguf", for a bound adapter, for flat names, and for changes
    that are a pair of factors, if they are one, only together with the base's weights.

    Raises OutputExistsError: `out` exists. StorageError: it cannot be written. UnsupportedAdapterError: the format
    cannot hold it, or only a package could tell how. BindError: it does not fit `package`. MissingDependencyError:
    "onnx_adapter" and no ONNX Runtime, "gguf" and no `gguf`. InputError: an unknown format, or no package.
    """
    target = Path(out)
    if format not in get_args(AdapterFormat):
        raise InputError(f"the format must be one of {', '.join(FORMATS)}, and is {format!r}", path=target)
    if format == "safetensors" or format == "onnx_adapter":
        if package is None:
            raise InputError(
                f"{format} holds the inputs of a package's graphs: give that package (--package)", path=target
            )
        return write_bound(bind(adapter, package), target, format=format)
    portable = make_portable(adapter, package)
    with staged_place(target) as place:
        _WRITERS[format](portable, place, package)
    return target
