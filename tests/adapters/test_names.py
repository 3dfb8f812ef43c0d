"""Names that leave something open are resolved by a package's own modules, and never by guessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_lora import Package, bind
from onnx_lora.adapters import Adapter
from onnx_lora.adapters.language_models import LAYOUTS, ModelLayout
from onnx_lora.adapters.module_names import KnownModules, with_package_names
from onnx_lora.errors import BindError
from onnx_lora.manifest import MANIFEST, GraphInfo
from tests.adapters.building import PackageBuilder, adapter, delta, numbers


def pipeline(folder: Path, parts: Mapping[str, Sequence[str]]) -> Package:
    """A package with a graph for each part; modules begin with its name."""
    builder = PackageBuilder(folder)
    for part, modules in parts.items():
        for module in modules:
            builder.point(f"{part}.{module}", 4, 6)
    package = builder.open()
    (graph,) = package.manifest.graphs
    graphs = tuple(_only(graph, part) for part in parts)
    (folder / MANIFEST).write_text(replace(package.manifest, graphs=graphs).to_json())
    return Package.open(folder)


def _only(graph: GraphInfo, part: str) -> GraphInfo:
    return replace(
        graph,
        name=part,
        points=tuple(point for point in graph.points if point.module.startswith(f"{part}.")),
        branches=tuple(branch for branch in graph.branches if branch.name.startswith(f"{part}.")),
    )


def single(folder: Path, *modules: str) -> Package:
    builder = PackageBuilder(folder)
    for module in modules:
        builder.point(module, 4, 6)
    builder.weight("norm.out.weight", 4, 6)
    builder.untargeted = ("deep.inside",)
    return builder.open()


def of(*modules: str, flat: bool = False) -> Adapter:
    return adapter({module: delta(4, 6) for module in modules}, flat_names=flat)


def names(own: Adapter) -> list[str]:
    return list(own.deltas)


# --- flat names --------------------------------------------------------------------------------


def test_flat_names_are_looked_up_among_the_packages_modules(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "a.b_c.d", "a.x")
    own = with_package_names(of("a_b_c_d", "a_x", flat=True), package)
    assert names(own) == ["a.b_c.d", "a.x"]
    assert not own.flat_names
    assert bind(of("a_b_c_d", flat=True), package).coverage.applied == ("a.b_c.d",)


def test_a_part_in_front_is_the_packages_own_or_left_out(tmp_path: Path) -> None:
    of_parts = pipeline(tmp_path / "p", {"unet": ["down_blocks.0.q"], "text_encoder": ["layers.0.q"]})
    own = with_package_names(of("unet.down_blocks_0_q", "text_encoder.layers_0_q", flat=True), of_parts)
    assert names(own) == ["unet.down_blocks.0.q", "text_encoder.layers.0.q"]
    alone = single(tmp_path / "alone", "down_blocks.0.q")
    assert names(with_package_names(of("unet.down_blocks_0_q", flat=True), alone)) == ["down_blocks.0.q"]


def test_a_part_that_the_name_says_twice_is_one(tmp_path: Path) -> None:
    package = pipeline(tmp_path / "p", {"unet": ["down_blocks.0.q"]})
    assert names(with_package_names(of("unet.unet_down_blocks_0_q", flat=True), package)) == ["unet.down_blocks.0.q"]


def test_another_parts_module_is_never_meant(tmp_path: Path) -> None:
    package = pipeline(tmp_path / "p", {"unet": ["q"], "text_encoder": ["v"]})
    with pytest.raises(BindError, match=r"unet\.text_encoder_v: the package has no such module"):
        bind(of("unet.text_encoder_v", flat=True), package)


def test_an_ambiguous_flat_name_is_refused_with_the_candidates(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "a.b_c", "a_b.c")
    with pytest.raises(BindError, match=r"a_b_c: may mean a\.b_c, a_b\.c"):
        bind(of("a_b_c", flat=True), package)


def test_two_names_of_one_module_are_refused(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "layers.0.q")
    own = of("text_encoder.layers_0_q", "text_encoder_2.layers_0_q", flat=True)
    with pytest.raises(BindError, match=r"layers\.0\.q: text_encoder\.layers_0_q and text_encoder_2\.layers_0_q both"):
        bind(own, package)


def test_an_unknown_flat_name_is_explained_as_all_unknown_ones_are(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "layers.0.q_proj")
    with pytest.raises(BindError, match=r"layers_0_k_proj: the package has no such module; the closest are layers"):
        bind(of("layers_0_k_proj", flat=True), package)


def test_modules_without_a_point_and_whole_weights_are_known_too(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "a.q")
    assert list(KnownModules.of(package).parts) == ["a.q", "deep.inside", "norm.out"]
    with pytest.raises(BindError, match=r"deep\.inside: the graph has this module"):
        bind(of("deep_inside", flat=True), package)
    whole = adapter({}, {"norm_out.weight": numbers(6, 4)}, flat_names=True)
    assert list(with_package_names(whole, package).replacements) == ["norm.out.weight"]


# --- parts of a pipeline -----------------------------------------------------------------------


def test_names_without_a_part_get_the_only_one_that_has_them_all(tmp_path: Path) -> None:
    package = pipeline(tmp_path / "p", {"unet": ["blocks.0.q", "blocks.0.v"], "text_encoder": ["blocks.0.q"]})
    own = with_package_names(of("blocks.0.q", "blocks.0.v"), package)
    assert names(own) == ["unet.blocks.0.q", "unet.blocks.0.v"]


def test_names_that_several_parts_have_are_refused_with_the_parts(tmp_path: Path) -> None:
    package = pipeline(tmp_path / "p", {"text_encoder": ["layers.0.q"], "text_encoder_2": ["layers.0.q"]})
    with pytest.raises(BindError, match=r"layers\.0\.q \(and 0 more\): may be of text_encoder, text_encoder_2"):
        bind(of("layers.0.q"), package)


def test_names_that_no_part_has_all_of_stay_as_they_are(tmp_path: Path) -> None:
    package = pipeline(tmp_path / "p", {"unet": ["q"], "text_encoder": ["v"]})
    assert names(with_package_names(of("q", "v"), package)) == ["q", "v"]
    with pytest.raises(BindError, match="the package has no such module"):
        bind(of("q", "v"), package)


def test_a_part_that_the_package_does_not_name_is_taken_off(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "blocks.0.q")
    assert names(with_package_names(of("unet.blocks.0.q"), package)) == ["blocks.0.q"]
    for others in (["unet.blocks.0.q", "text_encoder.blocks.0.q"], ["unet.blocks.0.v"], ["model.blocks.0.q"]):
        assert names(with_package_names(of(*others), package)) == others


def test_a_package_of_one_model_has_no_parts_whatever_its_modules_are_called(tmp_path: Path) -> None:
    """GPT-2's modules begin with `transformer`, a part of some pipelines."""
    package = single(tmp_path / "p", "transformer.h.0.q")
    assert names(with_package_names(of("transformer.h.0.q"), package)) == ["transformer.h.0.q"]
    with pytest.raises(BindError, match=r"lacks the prefix 'transformer\.'"):
        bind(of("h.0.q"), package)


def test_names_that_the_package_has_are_left_alone(tmp_path: Path) -> None:
    package = pipeline(tmp_path / "p", {"unet": ["q"], "text_encoder": ["q"]})
    own = of("unet.q")
    assert with_package_names(own, package) is own


# --- names of wrappers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling", ["module.layers.0.q", "layers.0.module.q", "_orig_mod.layers.0.q", "layers.0._fsdp_wrapped_module.q"]
)
def test_what_a_wrapper_left_in_names_is_taken_off(tmp_path: Path, spelling: str) -> None:
    package = single(tmp_path / "p", "layers.0.q", "layers.0.v")
    assert names(with_package_names(of(spelling, "layers.0.v"), package)) == ["layers.0.q", "layers.0.v"]


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "module.q", "q")
    assert names(with_package_names(of("module.q"), package)) == ["module.q"]


def test_a_wrapped_and_a_bare_name_of_one_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BindError, match=r"layers\.0\.q: layers\.0\.q and module\.layers\.0\.q both mean it"):
        bind(of("layers.0.q", "module.layers.0.q"), single(tmp_path / "p", "layers.0.q"))


# --- classes with the same language model ------------------------------------------------------


@pytest.mark.parametrize("of_package", LAYOUTS, ids=lambda layout: layout.body)
@pytest.mark.parametrize("of_adapter", LAYOUTS, ids=lambda layout: layout.body)
def test_another_classs_names_are_the_packages(
    tmp_path: Path, of_adapter: ModelLayout, of_package: ModelLayout
) -> None:
    parts = [("body", "layers.0.q"), ("head", "")]
    package = single(tmp_path / "p", *map(of_package.name_of, parts))
    own = with_package_names(of(*map(of_adapter.name_of, parts)), package)
    assert names(own) == list(map(of_package.name_of, parts))
    assert bool(own.notes) == (list(map(of_adapter.name_of, parts)) != names(own))


def test_what_a_model_has_beside_its_language_model_is_renamed_too(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "model.language_model.layers.0.q", "model.visual.blocks.0.qkv")
    own = of("model.layers.0.q", "visual.blocks.0.qkv")
    assert names(with_package_names(own, package)) == list(package.points)


def test_an_adapter_of_the_vision_tower_too_is_refused_by_a_text_only_package(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "model.layers.0.q")
    own = of("model.language_model.layers.0.q", "model.visual.blocks.0.qkv")
    with pytest.raises(BindError) as caught:
        bind(own, package)
    assert "model.visual.blocks.0.qkv: the package has no such module" in str(caught.value)
    assert "model.language_model.layers.0.q: the package has no such module" in str(caught.value)


def test_two_language_models_that_names_may_mean_are_both_named(tmp_path: Path) -> None:
    package = single(tmp_path / "p", "thinker.model.layers.0.q", "talker.model.layers.0.q")
    with pytest.raises(BindError, match=r"may mean thinker\.model\.layers\.0\.q or talker\.model\.layers\.0\.q"):
        bind(of("model.layers.0.q"), package)


def test_whole_weights_are_of_the_other_class_too(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "p").point("model.layers.0.q", 4, 6).whole("model.norm.weight", 4).open()
    own = adapter({"language_model.model.layers.0.q": delta(4, 6)}, {"language_model.model.norm.weight": numbers(4)})
    coverage = bind(own, package).coverage
    assert (coverage.applied, coverage.replaced) == (("model.layers.0.q",), ("model.norm.weight",))
    assert coverage.notes == (
        "the adapter was trained on another class of this model: its modules language_model.model.… are this package's "
        "model.…",
    )


# --- names of another version of transformers ----------------------------------------------------


def of_vit(folder: Path, *modules: str) -> Package:
    builder = PackageBuilder(folder)
    builder.config = {"model_type": "vit"}
    for module in modules:
        builder.point(module, 4, 6)
    return builder.open()


NEWER = ("vit.layers.0.attention.q_proj", "vit.layers.11.mlp.fc2", "classifier")
OLDER = ("vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.11.output.dense", "classifier")


@pytest.mark.parametrize("of_package, of_adapter", [(NEWER, OLDER), (OLDER, NEWER)])
def test_another_versions_names_are_the_packages(
    tmp_path: Path, of_package: Sequence[str], of_adapter: Sequence[str]
) -> None:
    own = with_package_names(of(*of_adapter), of_vit(tmp_path / "p", *of_package))
    assert names(own) == list(of_package)
    (note,) = own.notes
    assert f"{of_adapter[0]} is this package's {of_package[0]}" in note


def test_text_encoders_of_pipelines_have_names_of_another_version_too(tmp_path: Path) -> None:
    older, newer = "text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"
    package = pipeline(tmp_path / "p", {"unet": ["q"], "text_encoder": [older]})
    own = with_package_names(of("unet.q", f"text_encoder.{newer}"), package)
    assert names(own) == ["unet.q", f"text_encoder.{older}"]


def test_another_versions_names_are_those_of_the_packages_type_alone(tmp_path: Path) -> None:
    package = single(tmp_path / "p", *NEWER)
    assert names(with_package_names(of(*OLDER), package)) == list(OLDER)


def test_one_name_that_no_version_has_leaves_all_as_they_are(tmp_path: Path) -> None:
    strange = (*OLDER, "vit.encoder.layer.0.attention.attention.queries")
    with pytest.raises(BindError) as caught:
        bind(of(*strange), of_vit(tmp_path / "p", *NEWER))
    for name in (OLDER[0], strange[-1]):
        assert f"{name}: the package has no such module" in str(caught.value)


def test_a_name_that_two_modules_had_is_refused_with_both(tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "p")
    builder.config = {"model_type": "zoedepth", "backbone": {"model_type": "beit"}}
    wanted = ("backbone.layers.0.attention.q_proj", "backbone.beit.layers.0.attention.q_proj")
    for module in wanted:
        builder.point(module, 4, 6)
    old = "backbone.encoder.layer.0.attention.attention.query"
    with pytest.raises(BindError) as caught:
        bind(of(old), builder.open())
    assert all(name in str(caught.value) for name in (old, *wanted))


def test_two_versions_names_of_one_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BindError, match="both mean it"):
        bind(of(NEWER[0], OLDER[0]), of_vit(tmp_path / "p", *NEWER))
