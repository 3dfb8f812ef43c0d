"""Bound adapters as ONNX Runtime's `.onnx_adapter` files, which hold inputs of graphs and nothing else. Olive's files
are read too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, Origin, refuse_fold_only
from onnx_lora.adapters.bases import base_number, is_base_number
from onnx_lora.adapters.formats.converted.modules import split_modules
from onnx_lora.adapters.formats.converted.olive import from_olive
from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, name_problems
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.boundary import translate_unwritten
from onnx_lora.errors import AdapterFileError, StorageError
from onnx_lora.onnxruntime_errors import fail_as, load_onnxruntime
from onnx_lora.points import Array
from onnx_lora.staging import scratch

__all__ = ["FORMAT"]

# Bytes 4 to 8 of a flatbuffer; ONNX Runtime's lora/adapter_format schema.
_MARK = b"TORT"

# Where an `.onnx_adapter` keeps our number for the base.
_NUMBER = "model_version"

_OF_ONE_PRECISION = (
    "DoRA's scales in an .onnx_adapter are those of the package that it was converted for; in another precision the "
    "base has others, and the file does not say which these are"
)


class OnnxAdapterFormat:
    name = "onnx_adapter"
    ending = ".onnx_adapter"
    row = Row(
        "`.onnx_adapter`",
        "ONNX Runtime's mark; ours and Olive's",
        "multiplied in already",
        "factors that Olive quantized",
    )

    def recognises(self, place: Place) -> bool:
        return not place.is_folder and (place.path.suffix == self.ending or _has_mark(place.beginning))

    def read(self, place: Place, name: str | None) -> Adapter:
        return _read(place.read(_read_file), place.path, name or place.default_name)

    def write_bound(self, bound: BoundAdapter, out: Path) -> None:
        """Raises MissingDependencyError: no ONNX Runtime. StorageError: it could not write the file."""
        refuse_fold_only(bound, bound.coverage.fold_only)
        _write(bound, out, _onnxruntime())


FORMAT = OnnxAdapterFormat()


def _write(bound: BoundAdapter, path: Path, runtime: ModuleType) -> None:
    # The OrtValues are views of the arrays.
    inputs = bound.graph_inputs
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(1)
    # Neither ONNX Runtime nor GenAI looks at it, and both refuse a parameter that is no input of the graph.
    adapter.set_model_version(base_number(inputs, bound.graphs) if bound.graphs else 1)
    adapter.set_parameters(values)
    with fail_as(lambda said: StorageError(f"ONNX Runtime could not write it: {said}", path=path.name)):
        adapter.export_adapter(str(path))


def _has_mark(beginning: bytes) -> bool:
    return beginning[4:8] == _MARK


def _read_file(file: Reading) -> TensorFile:
    """Raises AdapterFileError: damaged. MissingDependencyError: no ONNX Runtime. StorageError: no place for a copy."""
    if not _has_mark(file.ahead(8)):
        raise AdapterFileError("is no adapter of ONNX Runtime, or cut off: its mark is missing", path=file.path)
    runtime = _onnxruntime(file.path)
    content = file.rest()
    # ONNX Runtime maps the file that it reads: it gets one that nobody else can change.
    with scratch() as folder:
        copy = folder / "adapter"
        try:
            copy.write_bytes(content)
        except OSError as error:
            raise translate_unwritten(error, copy) from error
        tensors, number = _parameters(runtime, copy, file.path)
    problems = name_problems(tensors)
    if problems:
        raise AdapterFileError("is damaged; convert the adapter again", path=file.path, problems=problems)
    return TensorFile(tensors, {_NUMBER: str(number)}, file.sha256())


def _parameters(runtime: ModuleType, copy: Path, path: Path) -> tuple[dict[str, Array], int]:
    """The tensors by name, and the number that stands for the base."""
    tensors: dict[str, Array] = {}
    with fail_as(lambda said: AdapterFileError(f"is damaged; convert the adapter again ({said})", path=path)):
        file = runtime.AdapterFormat.read_adapter(str(copy))
        number = int(file.get_model_version())
        for key, value in file.get_parameters().items():
            # Copied: the values are views of the mapped file.
            array = np.array(value.numpy())
            array.flags.writeable = False
            tensors[key] = array
    return tensors, number


def _read(file: TensorFile, path: Path, name: str) -> Adapter:
    """Tensors as in a `.safetensors` file of ours, or as Olive writes them.

    Raises AdapterFileError: no adapter. UnsupportedAdapterError: quantized by Olive.
    """
    modules = split_modules(from_olive(file.tensors, path), path)
    origin = Origin(str(path), file.sha256, "onnx_adapter", "", "")
    adapter = Adapter(name, modules.deltas, modules.replacements, origin, changes=modules.scales)
    number = int(file.metadata[_NUMBER])
    if not is_base_number(number):
        note = "this .onnx_adapter does not say which base it was bound to, so that was not checked"
        return replace(adapter, notes=(note,))
    has_scales = bool(modules.scales) or any(delta.output_scale is not None for delta in modules.deltas.values())
    return replace(adapter, base_number=number, notes=(_OF_ONE_PRECISION,) if has_scales else ())


def _onnxruntime(path: Path | None = None) -> ModuleType:
    """`path`: of the file that is read."""
    module: ModuleType = load_onnxruntime(".onnx_adapter files need", path=path)
    return module
