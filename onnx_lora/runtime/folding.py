"""Fold an adapter into a base graph as a session starts: nothing is written, nothing of the base changed.

It knows which values take which initializer's place; `merge` knows how they are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx_lora.adapters import BoundAdapter
from onnx_lora.boundary import public
from onnx_lora.errors import BindError
from onnx_lora.manifest import GraphInfo
from onnx_lora.package import Package
from onnx_lora.points import NIBBLES, Array
from onnx_lora.runtime import _onnx
from onnx_lora.runtime._ort import CPU, Options, Providers, ort, own_options, start
from onnx_lora.runtime.bound import AnyAdapter, AnyPackage, Mixture, mixed, opened
from onnx_lora.runtime.merge import edits
from onnx_lora.runtime.requantize import Requantize, merged

__all__ = ["Progress", "fold"]

# Called with the weights folded so far, and how many there are.
Progress = Callable[[int, int], None]

# Where ONNX Runtime looks for the weights of a graph that it gets as bytes.
_FOLDER = "session.model_external_initializers_file_folder_path"


class _FoldedSession(ort.InferenceSession):  # type: ignore[misc]
    """An InferenceSession that keeps the values it was given: ONNX Runtime only points to them."""

    def __init__(self, *args: Any, values: Mapping[str, Any], **kwargs: Any) -> None:
        self._values = values
        super().__init__(*args, **kwargs)


@public
def fold(
    package: AnyPackage,
    adapter: AnyAdapter | Mixture,
    *,
    graph: str | None = None,
    providers: Providers | None = None,
    provider_options: Sequence[dict[Any, Any]] | None = None,
    sess_options: Any = None,
    requantize: Requantize | None = None,
    strict: bool = False,
    allow_unproven: bool = False,
    progress: Progress | None = None,
) -> Any:
    """An ordinary `onnxruntime.InferenceSession` with an adapter, or a blend, in its weights.

    `adapter`: a path, an Adapter or a BoundAdapter; or several with weights, as a mapping or as
    `(adapter, weight)` pairs. `sess_options` is copied, and may be used again; custom operators
    registered with it do not come along. `requantize`: leave to fold into quantized weights. `strict`: refuse
    adapters that name another base. `allow_unproven`: take points at which the graph may compute something else than
    the module.

    Raises AdapterError: it cannot be read, or does not fit. SelectionError: the blend cannot be had.
    PackageError: the package is broken, or has no such graph.
    """
    whole = opened(package).allowing_unproven(allow_unproven)
    info = whole.graph(graph)
    values = _folded(info, mixed(adapter, whole, strict=strict), whole, requantize, progress or (lambda *_: None))
    options = own_options(sess_options)
    if values:
        kept = CPU.values(values)
        options.add_external_initializers(list(kept), list(kept.values()))
    else:
        kept = {}
    path = whole.path / info.base_file
    model = _resized(info, whole, values)
    if model is not None:
        options.add_session_config_entry(_FOLDER, str(whole.path))

    def session(*args: Any, **kwargs: Any) -> Any:
        return _FoldedSession(*args, values=kept, **kwargs)

    return start(model or path, Options(providers, provider_options, options), path=path, kind=session)


def _folded(
    info: GraphInfo,
    adapter: BoundAdapter,
    package: Package,
    requantize: Requantize | None,
    progress: Progress,
) -> dict[str, Array]:
    todo = edits(info, adapter)
    progress(0, len(todo))
    values: dict[str, Array] = {}
    for done, edit in enumerate(todo, start=1):
        if small := [name for name, stored in edit.tensors.items() if stored.dtype in NIBBLES]:
            raise BindError(f"{small[0]}: ONNX Runtime takes no 4-bit values from memory; use fold_to")
        values.update(merged(edit, package, requantize))
        progress(done, len(todo))
    return values


def _resized(info: GraphInfo, package: Package, values: Mapping[str, Array]) -> bytes | None:
    """The base graph with other shapes, where the values have other shapes than the base's."""
    stored = {part.initializer: part.stored.shape for weight in info.replaceable for part in weight.parts}
    shapes = {name: value.shape for name, value in values.items() if value.shape != stored.get(name, value.shape)}
    if not shapes:
        return None
    model = _onnx.load(package.path / info.base_file)
    _onnx.resize(model, shapes)
    return bytes(model.SerializeToString())
