"""Ways in which an adapter could lose a part without a word, each found once by a reader who looked for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from onnx_lora import Package, bind, read_adapter
from onnx_lora.adapters import Delta, Replacement, blend, write_bound
from onnx_lora.adapters.compose import make_blend
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.adapters.methods.tokens import TokenRows
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import AdapterFileError, BindError, SelectionError
from onnx_lora.manifest import MANIFEST
from onnx_lora.points import Branch
from tests.adapters.building import PackageBuilder, adapter, bound, delta, numbers


def _package(folder: Path, *modules: str, dora: bool = False) -> Package:
    builder = PackageBuilder(folder)
    for module in modules:
        builder.point(module, 4, 6)
    builder.weight("q.weight", 4, 6)
    return _with_dora(builder.open()) if dora else builder.open()


def _with_dora(package: Package) -> Package:
    graph = package.manifest.graphs[0]
    branches = tuple(replace(branch, dora=True) for branch in graph.branches)
    manifest = replace(package.manifest, graphs=(replace(graph, branches=branches),))
    (package.path / MANIFEST).write_text(manifest.to_json())
    return Package.open(package.path)


def _dora(**more: Any) -> Delta:
    return replace(delta(4, 6), magnitude=numbers(6, seed=9), **more)


class Doubled:
    """A change that only folds."""

    method = "doubling"

    def explain_misfit(self, shape: tuple[int, ...], kind: str) -> None:
        return None

    def apply_to(self, weight: Any) -> Any:
        return 2 * weight

    def as_factors(self, weight: Any) -> None:
        return None

    def output_scale(self) -> None:
        return None


def test_a_scale_is_not_dropped_by_a_package_that_takes_none(tmp_path: Path) -> None:
    there = bound(_package(tmp_path / "dora", "q", dora=True), {"q": _dora()})
    assert not there.coverage.fold_only
    here = bind(there, _package(tmp_path / "plain", "q"))
    assert set(here.coverage.fold_only) == {"q"}


def test_a_change_is_not_dropped_by_a_package_without_its_module(tmp_path: Path) -> None:
    there = bound(_package(tmp_path / "two", "q", "v"), None, None, changes={"v": Doubled()})
    with pytest.raises(BindError, match="v: the package has no such module"):
        bind(there, _package(tmp_path / "one", "q"))


@pytest.mark.parametrize("more", [{"deltas": {"q": _dora()}}, {"changes": {"q": Doubled()}}])
def test_what_is_no_sum_does_not_go_with_another_weight_below_it(tmp_path: Path, more: Any) -> None:
    package = _package(tmp_path / "p", "q")
    whole = {"q.weight": numbers(6, 4)}
    with pytest.raises(BindError, match=r"q: has .* and a whole weight too"):
        bind(adapter(more.get("deltas"), whole, changes=more.get("changes", {})), package)
    one = bind(adapter(more.get("deltas"), changes=more.get("changes", {}), name="one"), package)
    other = bound(package, None, whole, name="other")
    with pytest.raises(SelectionError, match=r"q: its change .* does not add"):
        blend([(one, 1.0), (other, 1.0)])
    with pytest.raises(SelectionError, match="does not add"):
        make_blend([(one, 1.0), (other, 1.0)], name="both")


def test_two_tensors_of_kohya_for_one_parameter_are_refused(tmp_path: Path) -> None:
    tensors = {f"lora_unet_m_q.{name}": numbers(6) for name in ("diff_b", "b_norm", "diff", "w_norm")}
    safetensors.numpy.save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(AdapterFileError, match=r"m_q: has two tensors for its"):
        read_adapter(tmp_path / "k.safetensors")


def test_the_config_of_a_network_saved_alone_counts(tmp_path: Path) -> None:
    fields = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}
    tensors = {f"a.to_q.lora_{side}.weight": numbers(*shape) for side, shape in {"A": (2, 4), "B": (6, 2)}.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.numpy.save_file(tensors, file, {"lora_adapter_metadata": json.dumps(fields)})
    assert read_adapter(file).deltas["a.to_q"].scale == 4.0
    named = {f"unet.{key}": value for key, value in fields.items()}
    safetensors.numpy.save_file(tensors, file, {"lora_adapter_metadata": json.dumps(named)})
    with pytest.raises(AdapterFileError, match="the header has configs of unet, and the tensors' names no part"):
        read_adapter(file)


def _language(folder: Path, *, says: bool | None, head: str = "lm_head", seed: int = 0) -> PackageBuilder:
    builder = PackageBuilder(folder)
    builder.table("embed_tokens", 9, 4, seed=seed)
    if head:
        builder.point(head, 4, 9, values=numbers(9, 4, seed=0))
    builder.config = {} if says is None else {"tie_word_embeddings": says}
    return builder


def _tokens() -> Any:
    return adapter(None, None, changes={"embed_tokens": TokenRows((1,), numbers(1, 4))})


def test_trained_tokens_go_into_the_head_that_is_tied(tmp_path: Path) -> None:
    tied = bind(_tokens(), _language(tmp_path / "a", says=True).open())
    assert set(tied.coverage.applied) == {"embed_tokens", "lm_head"}
    apart = bind(_tokens(), _language(tmp_path / "b", says=None, seed=5).open())
    assert set(apart.coverage.applied) == {"embed_tokens"}
    untied = bind(_tokens(), _language(tmp_path / "c", says=False).open())
    assert set(untied.coverage.applied) == {"embed_tokens"}


@pytest.mark.parametrize("head", ["lm_head", "proj_out", "generator_lm_head"])
def test_trained_tokens_are_refused_where_a_head_has_no_point(tmp_path: Path, head: str) -> None:
    builder = _language(tmp_path / "p", says=True, head="")
    builder.untargeted = (head,)
    with pytest.raises(BindError, match=f"`targets=` including {head}.*tie_word_embeddings"):
        bind(_tokens(), builder.open())


def test_trained_tokens_know_the_weights_of_modules_without_points(tmp_path: Path) -> None:
    same = numbers(9, 4, seed=0)
    tied = _language(tmp_path / "a", says=None, head="").untargeted_weight("decoder.embed_tokens", same)
    with pytest.raises(BindError, match=r"must change decoder\.embed_tokens too, which is tied to it"):
        bind(_tokens(), tied.open())
    apart = _language(tmp_path / "b", says=True, head="").untargeted_weight("lm_head", numbers(9, 4, seed=3))
    assert bind(_tokens(), apart.open()).coverage.applied == ("embed_tokens",)


def test_trained_tokens_are_refused_where_no_head_is_found(tmp_path: Path) -> None:
    with pytest.raises(BindError, match="the package has none with a point"):
        bind(_tokens(), _language(tmp_path / "p", says=True, head="").open())


def test_converting_takes_the_tied_half_along(tmp_path: Path) -> None:
    package = _language(tmp_path / "p", says=True).open()
    folder = write_adapter(_tokens(), tmp_path / "peft", format="peft", package=package)
    assert set(bind(read_adapter(folder), package).coverage.applied) == {"embed_tokens", "lm_head"}


def test_factors_made_from_a_weight_do_not_go_to_another_precision(tmp_path: Path) -> None:
    package = _language(tmp_path / "p", says=False).open()
    file = write_bound(bind(_tokens(), package), tmp_path / "t.safetensors")
    assert bind(read_adapter(file), package).made_of == {"embed_tokens": "float"}
    elsewhere = replace(read_adapter(file), made_of={"embed_tokens": "0" * 64})
    with pytest.raises(BindError, match="made from the weights of another precision"):
        bind(elsewhere, package)


def test_the_base_is_checked_under_new_names_too(tmp_path: Path) -> None:
    package = _package(tmp_path / "one", "q")
    read = read_adapter(write_bound(bound(package, {"q": delta(4, 6)}), tmp_path / "a.safetensors"))
    assert read.base_digests
    with pytest.raises(BindError, match="bound to another base"):
        bind(replace(read, base_digests={"other": "0" * 64}), package)


def test_a_packed_branch_with_scales_alone_is_read_back(tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "p").point("m.q", 4, 6).point("m.k", 4, 6)
    package = builder.open()
    graph = replace(package.manifest.graphs[0], branches=(Branch(("m.q", "m.k"), dora=True),))
    (package.path / MANIFEST).write_text(replace(package.manifest, graphs=(graph,)).to_json())
    package = Package.open(package.path)
    own = bind(replace(adapter(None), changes={"m.q": OutputScale(numbers(6))}), package)
    file = write_bound(own, tmp_path / "a.onnx_adapter", format="onnx_adapter")
    again = bind(read_adapter(file), package)
    assert set(again.tensors) == set(own.tensors) == {"m.q.dora_scale"}


def test_another_packages_bound_adapter_is_not_written(tmp_path: Path) -> None:
    here = bound(_package(tmp_path / "one", "q"), {"q": delta(4, 6)})
    other = PackageBuilder(tmp_path / "two").point("v", 4, 6).open()
    for format in ("peft", "safetensors"):
        with pytest.raises(BindError, match="bound to another package"):
            write_adapter(here, tmp_path / "out", format=format, package=other)  # type: ignore[arg-type]


def test_a_table_tied_by_its_values_is_not_replaced_alone(tmp_path: Path) -> None:
    package = _language(tmp_path / "p", says=None).table_weight("backbone.embeddings", numbers(9, 4, seed=0)).open()
    whole = {"backbone.embeddings.weight": Replacement(numbers(9, 4, seed=3), in_place=True)}
    with pytest.raises(BindError, match="over every weight tied to it, lm_head is tied to it, and the package cannot"):
        bind(adapter(None, whole), package)
