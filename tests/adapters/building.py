"""Packages and adapter folders made of literals, without any graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from onnx_lora import Adapter, BoundAdapter, Package, bind
from onnx_lora.adapters import Delta, Origin, Replacement
from onnx_lora.kinds import EMBEDDING
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, KnownWeight, Manifest, Unplaced
from onnx_lora.points import Array, Branch, InjectionPoint, StoredTensor, WeightPart, WholeWeight, digest
from onnx_lora.roles import LinearBias, LinearWeight, Parameter, Table

BASE_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny",
    "bias": "none",
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "r": 2,
    "target_modules": ["q", "v"],
}


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def peft_folder(
    folder: Path, tensors: Mapping[str, Array] | None = None, *, remove: Sequence[str] = (), **config: Any
) -> Path:
    """A PEFT folder with `BASE_CONFIG` changed by `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in (BASE_CONFIG | config).items() if key not in remove}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    whole = lora("m.q", 4, 6) if tensors is None else tensors
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(dict(whole)))
    return folder


def lora(
    module: str, inputs: int, outputs: int, *, rank: int = 2, dtype: str = "float32", seed: int = 1
) -> dict[str, Array]:
    key = f"base_model.model.{module}.lora_"
    return {
        f"{key}A.weight": numbers(rank, inputs, seed=seed, dtype=dtype),
        f"{key}B.weight": numbers(outputs, rank, seed=seed + 1, dtype=dtype),
    }


class PackageBuilder:
    """Collects points and replaceable weights, and writes them as a package."""

    def __init__(self, folder: Path, *, dtype: str = "float32") -> None:
        self.folder, self.dtype = folder, dtype
        self.data = b""
        self.points: list[InjectionPoint] = []
        self.replaceable: list[WholeWeight] = []
        self.untargeted: tuple[str, ...] = ()
        self.unplaced: tuple[Unplaced, ...] = ()
        self.tables: tuple[KnownWeight, ...] | None = None
        self.config: dict[str, Any] = {}
        self.source: dict[str, str] = {}

    def _store(self, name: str, values: Array) -> WeightPart:
        stored = StoredTensor("weights.bin", len(self.data), values.shape, values.dtype.name)
        self.data += np.ascontiguousarray(values).tobytes()
        return WeightPart(name, stored, outputs=values.shape[-1])

    def point(
        self, module: str, inputs: int, outputs: int, *, per_row: bool = True, values: Array | None = None
    ) -> PackageBuilder:
        own = numbers(outputs, inputs, seed=len(self.points) + 50, dtype=self.dtype)
        weight = own if values is None else values
        part = self._store(f"{module}.w", weight.T)
        self.points.append(InjectionPoint(module, inputs, outputs, self.dtype, per_row, digest(weight), (part,)))
        return self

    def table(self, module: str, entries: int, features: int, *, seed: int) -> PackageBuilder:
        """An embedding's point."""
        values = numbers(entries, features, seed=seed, dtype=self.dtype)
        part = self._store(f"{module}.w", values)
        point = InjectionPoint(module, entries, features, self.dtype, True, digest(values), (part,), EMBEDDING)
        self.points.append(point)
        return self

    def table_weight(self, module: str, values: Array) -> PackageBuilder:
        """An embedding's table that is replaceable."""
        part = self._store(f"{module}.weight", values)
        self.replaceable.append(
            WholeWeight(f"{module}.weight", Table(), values.shape, self.dtype, True, False, digest(values), (part,))
        )
        return self

    def untargeted_weight(self, module: str, values: Array) -> PackageBuilder:
        """A module without a point whose weight is known by its digest."""
        self.untargeted = (*self.untargeted, module)
        self.tables = (*(self.tables or ()), KnownWeight(module, self.dtype, digest(values)))
        return self

    def weight(
        self,
        name: str,
        inputs: int,
        outputs: int,
        *,
        free: bool = False,
        per_row: bool = True,
        values: Array | None = None,
    ) -> PackageBuilder:
        values = numbers(outputs, inputs, seed=77, dtype=self.dtype) if values is None else values
        part = self._store(name, values.T)
        self.replaceable.append(
            WholeWeight(name, LinearWeight(), values.shape, self.dtype, free, per_row, digest(values), (part,))
        )
        return self

    def bias(self, name: str, outputs: int, *, free: bool = False, per_row: bool = True) -> PackageBuilder:
        values = numbers(outputs, seed=78, dtype=self.dtype)
        part = self._store(name, values)
        self.replaceable.append(
            WholeWeight(name, LinearBias(), values.shape, self.dtype, free, per_row, digest(values), (part,))
        )
        return self

    def whole(self, name: str, *shape: int) -> PackageBuilder:
        values = numbers(*shape, seed=79, dtype=self.dtype)
        part = self._store(name, values)
        self.replaceable.append(
            WholeWeight(name, Parameter(), values.shape, self.dtype, False, False, digest(values), (part,))
        )
        return self

    def open(self) -> Package:
        self.folder.mkdir()
        graph = GraphInfo(
            "model",
            "model.onnx",
            "base.onnx",
            tuple(self.points),
            tuple(Branch((point.module,)) for point in self.points),
            tuple(self.replaceable),
            self.untargeted,
            self.unplaced,
            self.tables,
        )
        for name, data in (("model.onnx", b"x"), ("base.onnx", b"x"), ("weights.bin", self.data or b"x")):
            (self.folder / name).write_bytes(data)
        if self.config:
            (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / MANIFEST).write_text(Manifest(FORMAT_VERSION, "test", self.source, (graph,)).to_json())
        return Package.open(self.folder)


ORIGIN = Origin("somewhere/adapter", "0" * 64, "peft", "LoRA", "tiny")


def delta(inputs: int, outputs: int, *, rank: int = 2, scale: float = 1.0, seed: int = 1) -> Delta:
    return Delta(numbers(rank, inputs, seed=seed), numbers(outputs, rank, seed=seed + 1), scale)


def adapter(
    deltas: Mapping[str, Delta] | None = None,
    replacements: Mapping[str, Array | Replacement] | None = None,
    *,
    name: str = "a",
    **more: Any,
) -> Adapter:
    whole = {
        key: value if isinstance(value, Replacement) else Replacement(value)
        for key, value in (replacements or {}).items()
    }
    return Adapter(name, deltas or {}, whole, ORIGIN, **more)


def bound(package: Package, *args: Any, **more: Any) -> BoundAdapter:
    return bind(adapter(*args, **more), package)


def effect(tensors: Mapping[str, Array], module: str) -> Array:
    """A·B `[rows, in, out]` in float64."""
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    return np.matmul(a.astype(np.float64), b.astype(np.float64))
