"""Packages and adapters that older versions wrote are read as they were meant: `tests/golden/make.py` says what they
are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_lora import AdapterSession, Package, bind, fold, read_adapter
from onnx_lora.errors import BindError, PackageError
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, parse_manifest
from onnx_lora.older_manifests import OLDEST_VERSION
from onnx_lora.points import Array
from tests.golden.make import MODELS
from tests.support.numbers import assert_close, assert_same_bits

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(int(folder.name.removeprefix("format-")) for folder in GOLDEN.glob("format-*"))

each = pytest.mark.parametrize("name", MODELS)
of_every_format = pytest.mark.parametrize("version", FORMATS)


def _folder(version: int, name: str) -> Path:
    return GOLDEN / f"format-{version}" / name


def _outputs(folder: Path) -> dict[str, Any]:
    with np.load(folder / "outputs.npz") as archive:
        return dict(archive)


def _written(package: Path) -> dict[str, Any]:
    """The manifest's JSON, as it lies in the folder."""
    data: dict[str, Any] = json.loads((package / MANIFEST).read_text("utf-8"))
    return data


def test_every_format_that_is_read_has_golden_packages() -> None:
    assert list(range(OLDEST_VERSION, FORMAT_VERSION + 1)) == FORMATS


@of_every_format
@each
def test_the_packages_are_of_their_format(version: int, name: str) -> None:
    assert _written(_folder(version, name) / "package")["format_version"] == version


@of_every_format
@each
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".onnx_adapter"], ids=["peft", "converted", "onnx_adapter"])
def test_todays_code_computes_what_theirs_did(version: int, name: str, suffix: str) -> None:
    folder, model = _folder(version, name), MODELS[name]()
    golden = _outputs(folder)
    compare = _choose_comparison(golden)
    package = Package.open(folder / "package", allow_unproven=True)
    session = AdapterSession(package)
    compare(session.run(None, model.feeds)[0], golden["base"])
    for adapter in model.adapters:
        if not (folder / f"{adapter}{suffix}").exists():
            continue
        bound = bind(read_adapter(folder / f"{adapter}{suffix}"), package)
        session.load_adapter(adapter, bound)
        compare(session.run(None, model.feeds, adapter=adapter)[0], golden[adapter])
        if adapter not in model.unfoldable:
            compare(_folded(package, bound, model.feeds), golden[f"{adapter} folded"])
    compare(session.run(None, model.feeds, adapter=list(model.rows))[0], golden["rows"])


def _choose_comparison(golden: Mapping[str, Any]) -> Callable[[Array, Array], None]:
    """The tolerance table, as another processor's kernels may round otherwise, and may do so at one weight only.

    `ONNX_LORA_GOLDEN_BITS=1` asks for equal bits, on a processor like the one that wrote the outputs. They are compared
    where ONNX Runtime is of the same version too.
    """
    same_version = golden["onnxruntime"] == onnxruntime.__version__
    return assert_same_bits if same_version and os.environ.get("ONNX_LORA_GOLDEN_BITS") == "1" else assert_close


def _folded(package: Package, bound: Any, feeds: Mapping[str, Array]) -> Array:
    folded: Array = fold(package, bound).run(None, dict(feeds))[0]
    return folded


@of_every_format
@each
def test_read_and_written_again_they_are_of_todays_format(version: int, name: str) -> None:
    package = Package.open(_folder(version, name) / "package")
    data = json.loads(package.manifest.to_json())
    assert (data["format_version"], data["minimum_reader"]) == (FORMAT_VERSION, FORMAT_VERSION)
    assert parse_manifest(data, package.path) == package.manifest
    today = Package.open(_folder(FORMAT_VERSION, name) / "package")
    assert _plain(package.manifest.graphs) == _plain(today.manifest.graphs)
    assert package.fingerprint == today.fingerprint


def _plain(graphs: tuple[GraphInfo, ...]) -> list[GraphInfo]:
    """Without doubts, whose words changed."""
    return [graph.with_doubts(lambda _: "") for graph in graphs]


@each
def test_attached_packages_of_format_3_are_doubted_and_others_are_not(name: str, tmp_path: Path) -> None:
    """That version did not look for traces of optimisers in graphs that somebody else had exported."""
    package = Package.open(_folder(3, name) / "package")
    assert set(package.unproven) == {*package.points, *package.replaceable}
    with pytest.raises(BindError, match="did not look for traces of optimisers"):
        bind(read_adapter(_folder(3, name) / next(iter(MODELS[name]().adapters))), package)
    exported = tmp_path / "exported"
    shutil.copytree(package.path, exported)
    data = _written(exported)
    data["source"]["made_by"] = "optimum"
    (exported / MANIFEST).write_text(json.dumps(data), "utf-8")
    assert not Package.open(exported).unproven


def test_a_proof_is_recorded_in_todays_format(tmp_path: Path) -> None:
    shutil.copytree(_folder(3, "text") / "package", tmp_path / "package")
    package = Package.open(tmp_path / "package")
    proven = package.record_proof(package.unproven)
    assert not proven.unproven
    opened = Package.open(package.path)
    assert not opened.unproven
    assert _written(package.path)["format_version"] == FORMAT_VERSION
    assert replace(opened.manifest, graphs=()) == replace(package.manifest, graphs=())


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph["points"][0].update(kind="maze"),
        lambda graph: graph["points"][0].update(kind=7),
        lambda graph: graph["points"][0].update(parts="all"),
        lambda graph: graph["points"][0]["parts"][0].update(quantised=[1, 2]),
        lambda graph: graph["points"][0]["parts"][0].update(quantised={"scheme": 1}),
        lambda graph: graph["points"].append(7),
        lambda graph: graph["replaceable"][0].update(role="maze"),
        lambda graph: graph["replaceable"][0].update(role=["linear_weight"]),
        lambda graph: graph["replaceable"][0].update(in_out=3),
        lambda graph: graph.update(points=None),
        lambda graph: graph.update(replaceable={}),
    ],
)
def test_damaged_manifests_of_older_formats_are_refused(version: int, change: Any, tmp_path: Path) -> None:
    data = _written(_folder(version, "text") / "package")
    change(data["graphs"][0])
    with pytest.raises(PackageError, match=r"manifest\.graphs|quantised must"):
        parse_manifest(data, tmp_path)


@pytest.mark.parametrize(
    "place, field, value, message",
    [
        ("points", "groups", 2, r"kind 'linear' must have kernel \[\] and groups 1, not \[\] and 2"),
        ("points", "kernel", [1], r"kind 'linear' must have kernel \[\] and groups 1, not \[1\] and 1"),
        ("replaceable", "in_out", "no", "in_out must be true or false, not 'no'"),
    ],
)
def test_what_an_older_manifest_says_besides_must_fit_its_kinds(
    tmp_path: Path, place: str, field: str, value: object, message: str
) -> None:
    shutil.copytree(_folder(4, "text") / "package", tmp_path / "package")
    written = _written(tmp_path / "package")
    written["graphs"][0][place][-1][field] = value
    (tmp_path / "package" / MANIFEST).write_text(json.dumps(written))
    with pytest.raises(PackageError, match=message):
        Package.open(tmp_path / "package")
