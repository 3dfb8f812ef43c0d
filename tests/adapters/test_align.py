"""Aligning: an adapter in the words of one package, once; binding and the writers of formats take the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lora import Package, bind
from onnx_lora.adapters import Delta
from onnx_lora.adapters.adapter import Adapter, HasTensors, MatrixDelta, NeedsConfig, OfTable
from onnx_lora.adapters.align import align
from onnx_lora.adapters.methods.ia3 import IA3
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.adapters.methods.tokens import TokenRows
from onnx_lora.adapters.module_names import RULES, KnownModules, explain_names
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import BindError, InputError
from onnx_lora.kinds import Kind
from onnx_lora.manifest import MANIFEST
from onnx_lora.points import Array, Branch
from tests.adapters.building import PackageBuilder, adapter, delta, numbers
from tests.support.numbers import assert_same_bits


def single(folder: Path, *modules: str, config: Mapping[str, Any] | None = None) -> Package:
    builder = PackageBuilder(folder)
    builder.config = dict(config or {})
    for module in modules:
        builder.point(module, 4, 6)
    return builder.open()


def packed(folder: Path) -> Package:
    """Two modules in one branch."""
    package = single(folder, "m.q", "m.k")
    graph = replace(package.manifest.graphs[0], branches=(Branch(("m.q", "m.k"), dora=True),))
    (folder / MANIFEST).write_text(replace(package.manifest, graphs=(graph,)).to_json())
    return Package.open(folder)


@dataclass(frozen=True)
class OfHeads:
    """A change that is a delta once the number of heads is known."""

    made: Delta
    method: str = "LoRA"

    def with_config(self, config: Mapping[str, Any]) -> Delta | OfHeads:
        return self.made if config.get("heads") == 2 else self

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        return "the config must say how many heads there are"

    def apply_to(self, weight: Array) -> Array:
        return weight

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return None

    def output_scale(self) -> Array | None:
        return None


def test_binding_what_was_aligned_is_binding_the_adapter(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "a.q", "a.v")
    own = adapter({"a_q": delta(4, 6)}, flat_names=True)
    aligned = align(own, package)
    assert list(aligned.adapter.deltas) == ["a.q"]
    once, directly = bind(aligned, package), bind(own, package)
    assert once.coverage == directly.coverage
    for name, tensor in directly.tensors.items():
        assert_same_bits(once.tensors[name], tensor)


def test_what_was_aligned_with_another_package_is_not_bound(tmp_path: Path) -> None:
    here, there = single(tmp_path / "here", "q"), single(tmp_path / "there", "v")
    with pytest.raises(BindError, match="was aligned with the package"):
        bind(align(adapter({"q": delta(4, 6)}), here), there)


def test_converting_aligns_and_binds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = single(tmp_path / "p", "a.q")
    calls: list[str] = []
    import onnx_lora.adapters.binding
    import onnx_lora.adapters.portable

    for module in (onnx_lora.adapters.binding, onnx_lora.adapters.portable):
        monkeypatch.setattr(module, "align", lambda *given: calls.append("align") or align(*given))
    monkeypatch.setattr(onnx_lora.adapters.portable, "bind", lambda *given: calls.append("bind") or bind(*given))
    write_adapter(adapter({"a_q": delta(4, 6)}, flat_names=True), tmp_path / "out", format="peft", package=package)
    assert calls == ["align", "bind"]


def test_a_change_is_completed_by_the_packages_config(tmp_path: Path) -> None:
    own = adapter(None, changes={"q": OfHeads(delta(4, 6))})
    assert isinstance(own.changes["q"], NeedsConfig)
    told = single(tmp_path / "told", "q", config={"heads": 2})
    assert list(align(own, told).adapter.deltas) == ["q"]
    silent = single(tmp_path / "silent", "q")
    with pytest.raises(BindError, match="q: the config must say how many heads there are"):
        bind(own, silent)


def test_a_completed_change_does_not_hide_a_delta(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "q", config={"heads": 2})
    own = adapter({"q": delta(4, 6, seed=5)}, changes={"q": OfHeads(delta(4, 6))})
    with pytest.raises(BindError, match="q: has a delta and LoRA too"):
        bind(own, package)


def test_a_packed_branchs_factors_become_its_modules(tmp_path: Path) -> None:
    package = packed(tmp_path / "p")
    (branch,) = package.manifest.graphs[0].branches
    a, b = numbers(3, 4), np.zeros((12, 3), np.float32)
    b[:6, 0], b[6:, 1:] = 1, 2
    deltas = align(adapter({branch.name: MatrixDelta(a, b, 1.0)}), package).adapter.deltas
    assert {module: own.rank for module, own in deltas.items()} == {"m.q": 1, "m.k": 2}
    assert_same_bits(deltas["m.k"].a, a[1:])


def test_a_packed_branchs_scales_become_its_modules(tmp_path: Path) -> None:
    package = packed(tmp_path / "p")
    (branch,) = package.manifest.graphs[0].branches
    scale = np.float32([1] * 6 + [2] * 6)
    changes = align(adapter(None, changes={branch.name: OutputScale(scale)}), package).adapter.changes
    assert list(changes) == ["m.k"]


@pytest.mark.parametrize("given", ["adapters/sql", None, 3])
def test_what_is_no_adapter_is_not_bound(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InputError, match="adapter must be Adapter"):
        bind(given, single(tmp_path / "p", "q"))


# --- names -------------------------------------------------------------------------------------


def of_pipeline() -> KnownModules:
    return KnownModules({"unet.mid.q": "unet", "unet.up.v": "unet", "text_encoder.l.q": "text_encoder"})


def of_one_model() -> KnownModules:
    return KnownModules({"mid.q": "", "up.v": ""})


def of_language_model() -> KnownModules:
    return KnownModules({"model.layers.0.q": "", "lm_head": ""})


@pytest.mark.parametrize(
    "known", [of_pipeline(), of_one_model(), of_language_model()], ids=["pipeline", "model", "language model"]
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_spelling_of_a_rule_is_understood_by_it(rule: Any, known: KnownModules) -> None:
    for module in known.parts:
        for spelling in rule.spellings(module, known):
            explained = rule.explain([spelling], known, flat=True)
            assert explained is not None
            assert not explained.problems
            assert explained.meant.get(spelling, spelling) == module


def test_no_rule_explains_names_that_the_package_has_not() -> None:
    for known in (of_pipeline(), of_one_model()):
        for name in ("other.q", "unet.other", "mid"):
            assert explain_names([name], known).meant.get(name, name) == name


# --- the tensors of changes --------------------------------------------------------------------


def _with(change: Any, name: str = "q") -> Adapter:
    return adapter(None, changes={name: change})


def test_the_tensors_of_a_change_must_be_finite(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "q")
    vector = numbers(6)
    vector[2] = np.nan
    with pytest.raises(BindError, match="q, vector: 1 of 6 values are NaN or infinite"):
        bind(_with(IA3(vector, False)), package)


def test_a_change_may_name_its_tensors_as_its_file_does(tmp_path: Path) -> None:
    class Named(IA3):
        def tensors(self) -> Mapping[str, Array]:
            return {"ia3_l": self.vector, "indices": np.arange(3)}

    vector = np.full(6, np.inf, np.float32)
    named = Named(vector, False)
    assert isinstance(named, HasTensors)
    with pytest.raises(BindError, match="q, ia3_l: 6 of 6 values are NaN or infinite"):
        bind(_with(named), single(tmp_path / "p", "q"))


def test_a_change_of_a_table_says_what_it_is_at_a_head() -> None:
    assert isinstance(TokenRows((1,), numbers(1, 4)), OfTable)
