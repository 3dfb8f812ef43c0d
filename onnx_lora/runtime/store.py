"""The adapters of one session on its device: each made once, mixtures of them kept within a limit. It
knows OrtValues by name, not how they are run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from onnx_lora.adapters import BoundAdapter, stack_rows
from onnx_lora.adapters.compose import add_up, check_weights
from onnx_lora.errors import SelectionError
from onnx_lora.manifest import GraphInfo
from onnx_lora.package import Package
from onnx_lora.points import Array, digest, in_memory
from onnx_lora.runtime._ort import Device
from onnx_lora.runtime.loaded import Key, Loaded, Part, Values
from onnx_lora.runtime.selection import Selection, explain_unknown

__all__ = ["Store", "resolve"]


@dataclass(frozen=True, slots=True)
class _Entry:
    values: Values
    size: int  # bytes


class Store:
    """Adapters by name, safe to use from many threads: readers never wait for loading or composing."""

    def __init__(self, package: Package, graph: GraphInfo, device: Device, limit: int) -> None:
        """`graph`: the session's. `limit`: bytes of composed tensors kept."""
        self._package = package
        self._graph = graph
        self._device = device
        self._limit = limit
        self._lock = Lock()
        # Never changed, only exchanged: whoever holds it sees the same adapters until it is done.
        self._loaded: Mapping[str, Loaded] = {}
        self._composed: OrderedDict[Key, _Entry] = OrderedDict()
        self._size = 0

    @property
    def loaded(self) -> Mapping[str, Loaded]:
        """The adapters of this moment; a snapshot that later changes leave alone."""
        return self._loaded

    def add(self, name: str, bound: BoundAdapter, *, replace: bool = False) -> None:
        """Put a bound adapter on the device, and keep what its rows may meet; no call reads a file later.

        `replace`: an adapter of this name makes way in the moment in which the new one is ready, so that the name
        always stands for one of the two.

        Raises SelectionError: the name is taken. PackageError: the base's own values cannot be read.
        """
        part = _restrict(bound, name, self._graph)
        values = self._device.values(self._graph.inputs(part.tensors))
        loaded = Loaded(bound, part, values, self._find_defaults(part))
        with self._lock:
            if not replace:
                self.check_free(name)
            gone = self._loaded.get(name)
            self._loaded = {**self._loaded, name: loaded}
            if gone is not None:
                self._drop_composed(gone)

    def _find_defaults(self, part: BoundAdapter) -> dict[str, Array]:
        """The base's own values of every weight of the modules in which an adapter replaces one: a row of the base
        needs them in one batch with a row of the adapter. Weights without rows are never stacked; of these only those
        are kept that the adapter replaces by the base's own value."""
        modules = {name.rpartition(".")[0] for name in part.coverage.replaced}
        kept: dict[str, Array] = {}
        for loaded in self._loaded.values():
            kept.update(loaded.defaults)
        defaults: dict[str, Array] = {}
        for name, weight in self._package.replaceable.items():
            own = part.tensors.get(name)
            if weight.module not in modules:
                continue
            if weight.has_rows:
                defaults[name] = kept[name] if name in kept else self._package.default(weight)
            elif own is not None and digest(weight.to_torch(own)) == weight.sha256:
                defaults[name] = own
        return defaults

    def check_free(self, name: str) -> None:
        """Raises SelectionError: the name is taken."""
        if name in self._loaded:
            raise SelectionError(
                f"an adapter {name!r} is loaded already; put this one in its place with replace=True, or choose "
                "another name"
            )

    def remove(self, name: str) -> None:
        """Forget an adapter and everything composed of it. Raises SelectionError: it is not loaded."""
        with self._lock:
            if name not in self._loaded:
                raise SelectionError(explain_unknown(name, self._loaded))
            gone = self._loaded[name]
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}
            self._drop_composed(gone)

    def _drop_composed(self, gone: Loaded) -> None:
        """Forget everything composed of an adapter. The lock must be held."""
        stale = [key for key in self._composed if _uses(key, gone)]
        for key in stale:
            self._size -= self._composed.pop(key).size

    def values(self, selection: Selection, loaded: Mapping[str, Loaded]) -> Values:
        """The tensors of a selection made from the snapshot `loaded`; none for the base.

        Raises SelectionError: its parts cannot be composed.
        """
        key = resolve(selection, loaded)
        if len(key) == 1:
            part = key[0]
            if not part:
                return {}
            if _is_alone(part):
                adapter, _ = part[0]
                return adapter.values
        with self._lock:
            entry = self._composed.get(key)
            if entry is not None:
                self._composed.move_to_end(key)
                return entry.values
        return self._compose(key)

    def _compose(self, key: Key) -> Values:
        # Outside the lock: two threads may do the same work once, and none waits for another's.
        blends = {part: _blend_part(part) for part in dict.fromkeys(key)}
        tensors = blends[key[0]]
        if len(key) > 1:
            defaults: dict[str, Array] = {}
            for part in blends:
                for loaded, _ in part:
                    defaults.update(loaded.defaults)
            tensors = stack_rows([blends[part] for part in key], self._package, defaults=defaults)
        inputs = self._graph.inputs(tensors)
        size = sum(value.nbytes for value in inputs.values())
        entry = _Entry(self._device.values(inputs), size)
        if size <= self._limit:
            self._keep(key, entry)
        return entry.values

    def _keep(self, key: Key, entry: _Entry) -> None:
        with self._lock:
            if key in self._composed or not self._has_all(key):
                return
            self._composed[key] = entry
            self._size += entry.size
            while self._size > self._limit:
                _, oldest = self._composed.popitem(last=False)
                self._size -= oldest.size

    def _has_all(self, key: Key) -> bool:
        """Whether all adapters of a key are loaded still: one unloaded meanwhile must not come back to life."""
        used: set[Loaded] = set()
        for part in key:
            used.update(loaded for loaded, _ in part)
        return used <= set(self._loaded.values())


def resolve(selection: Selection, loaded: Mapping[str, Loaded]) -> Key:
    """What a selection made from the snapshot `loaded` stands for, names left behind."""
    parts: list[Part] = []
    for choice in selection.choices:
        parts.append(tuple((loaded[name], weight) for name, weight in choice))
    return tuple(parts)


def _blend_part(part: Part) -> Mapping[str, Array]:
    if not part:
        return {}
    if _is_alone(part):
        return part[0][0].part.tensors
    # A group may name modules of another graph.
    check_weights([(loaded.bound, weight) for loaded, weight in part])
    return add_up([(loaded.part, weight) for loaded, weight in part])


def _is_alone(part: Part) -> bool:
    """One adapter at full strength."""
    return len(part) == 1 and part[0][1] == 1.0


def _uses(key: Key, adapter: Loaded) -> bool:
    """Whether an adapter is in any part of a key: that object, not another one of the same name."""
    used: list[Loaded] = []
    for part in key:
        used.extend(loaded for loaded, _ in part)
    return any(loaded is adapter for loaded in used)


def _restrict(bound: BoundAdapter, name: str, graph: GraphInfo) -> BoundAdapter:
    """What of an adapter concerns a graph, under the name it is loaded as."""
    names = {weight.name for weight in graph.replaceable}
    for point in graph.points:
        names |= {point.lora_a, point.lora_b, point.dora_scale}
    tensors: dict[str, Array] = {}
    for key, tensor in bound.tensors.items():
        if key in names:
            tensors[key] = np.ascontiguousarray(in_memory(tensor))
    modules = {point.module for point in graph.points}
    coverage = replace(
        bound.coverage,
        applied=tuple(module for module in bound.coverage.applied if module in modules),
        replaced=tuple(key for key in bound.coverage.replaced if key in tensors),
    )
    return replace(bound, name=name, tensors=tensors, coverage=coverage)
