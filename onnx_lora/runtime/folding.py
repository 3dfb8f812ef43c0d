"""Fold an adapter into a base graph as a session starts: nothing is written, nothing of the base changed.

It knows which values take which initializer's place; `merge` knows how they are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnx_lora.adapters import BoundAdapter
from onnx_lora.boundary import public
from onnx_lora.errors import BindError
from onnx_lora.manifest import GraphInfo
from onnx_lora.package import Package
from onnx_lora.points import NIBBLES, Array
from onnx_lora.runtime import _onnx
from onnx_lora.runtime._ort import CPU, Options, Providers, copy_options, ort, start_session
from onnx_lora.runtime.binding import AnyAdapter, AnyPackage, Mixture, bind_blend, open_package
from onnx_lora.runtime.merge import Progress, plan_edits
from onnx_lora.runtime.requantize import Requantize, compute_values

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["fold", "folded_bytes"]

# Where ONNX Runtime looks for the weights of a graph that it gets as bytes.
_FOLDER = "session.model_external_initializers_file_folder_path"


class _FoldedSession(ort.InferenceSession):  # type: ignore[misc]
    """An InferenceSession that keeps the values it was given: ONNX Runtime only points to them."""

    def __init__(self, *args: Any, values: Mapping[str, Any], size: int, **kwargs: Any) -> None:
        self._values = values
        self.folded_bytes = size
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
) -> InferenceSession:
    """An ordinary `onnxruntime.InferenceSession` with an adapter, or a blend, in its weights.

    `adapter`: a path, an Adapter or a BoundAdapter; or several with weights, as a mapping or as
    `(adapter, weight)` pairs. `sess_options` is copied, and may be used again; custom operators
    registered with it do not come along. `requantize`: the permission to fold into quantized
    weights. `strict`: refuse
    adapters that name another base. `allow_unproven`: take points at which the graph may compute something else than
    the module.

    Raises AdapterError: it cannot be read, or does not fit. SelectionError: the blend cannot be had.
    PackageError: the package is broken, or has no such graph. MissingDependencyError: the adapter's head has another
    number of outputs than the base's, which changes the graph, and the package `onnx` is not installed.
    """
    whole = open_package(package, allow_unproven=allow_unproven)
    info = whole.graph(graph)
    bound = bind_blend(adapter, whole, strict=strict)
    values = _fold_weights(info, bound, whole, requantize, progress)
    options = copy_options(sess_options)
    kept = CPU.values(values)
    if kept:
        options.add_external_initializers(list(kept), list(kept.values()))
    path = whole.path / info.base_file
    model = _resize_graph(info, whole, values)
    if model is not None:
        options.add_session_config_entry(_FOLDER, str(whole.path))

    def make_session(*args: Any, **kwargs: Any) -> InferenceSession:
        size = sum(value.nbytes for value in values.values())
        return _FoldedSession(*args, values=kept, size=size, **kwargs)

    started: InferenceSession = start_session(
        model or path, Options(providers, provider_options, options), path=path, kind=make_session
    )
    return started


def folded_bytes(session: InferenceSession) -> int:
    """The weights that a session of `fold` keeps beside the base's file, in bytes."""
    return session.folded_bytes if isinstance(session, _FoldedSession) else 0


def _fold_weights(
    info: GraphInfo,
    adapter: BoundAdapter,
    package: Package,
    requantize: Requantize | None,
    progress: Progress | None,
) -> dict[str, Array]:
    """The new values of all initializers that the adapter changes, by name."""
    edits = plan_edits(info, adapter)
    report = progress or _ignore
    report(0, len(edits))
    values: dict[str, Array] = {}
    for done, edit in enumerate(edits, start=1):
        for name, stored in edit.tensors.items():
            if stored.dtype in NIBBLES:
                raise BindError(f"{name}: ONNX Runtime takes no 4-bit values from memory; use fold_to")
        values.update(compute_values(edit, package, requantize))
        report(done, len(edits))
    return values


def _ignore(done: int, total: int) -> None:
    """Nobody asked for progress."""


def _resize_graph(info: GraphInfo, package: Package, values: Mapping[str, Array]) -> bytes | None:
    """The base graph with other shapes, where the values have other shapes than the base's.

    Raises MissingDependencyError: it must change, and the package `onnx` is not installed.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in info.replaceable:
        for part in weight.parts:
            value = values.get(part.initializer)
            if value is not None and value.shape != part.stored.shape:
                shapes[part.initializer] = value.shape
    if not shapes:
        return None
    model = _onnx.load(package.path / info.base_file)
    _onnx.resize(model, shapes)
    return bytes(model.SerializeToString())
