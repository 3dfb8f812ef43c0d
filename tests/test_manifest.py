"""How manifests live on: what an older and a newer reader make of one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from onnx_lora.codec import NEEDED_SINCE, Codec
from onnx_lora.errors import PackageError
from onnx_lora.kinds import Conv, Linear
from onnx_lora.manifest import FORMAT_VERSION, Manifest, parse_manifest
from onnx_lora.package import Package
from tests.adapters.building import PackageBuilder

FILE = Path("package/onnx_lora.json")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    builder = PackageBuilder(tmp_path / "package").point("layer.q", 4, 3).weight("head.weight", 4, 2, free=True)
    return builder.bias("head.bias", 2, free=True).whole("norm.weight", 4).open()


def _data(package: Package) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(package.manifest.to_json())
    return data


def test_a_manifest_comes_back_as_it_was(package: Package) -> None:
    assert parse_manifest(_data(package), FILE) == package.manifest


def test_fields_of_a_later_version_are_ignored_wherever_they_stand(package: Package) -> None:
    later = _data(package) | {"format_version": FORMAT_VERSION + 1, "signature": {"by": "nobody"}}
    graph = later["graphs"][0]
    graph["comment"] = "new"
    for owner in (graph["points"][0], graph["points"][0]["kind"], graph["replaceable"][0]["role"]):
        owner["later"] = [1]
    assert parse_manifest(later, FILE) == package.manifest


def test_a_package_that_needs_a_newer_reader_is_refused(package: Package) -> None:
    later = _data(package) | {"format_version": FORMAT_VERSION + 2, "minimum_reader": FORMAT_VERSION + 1}
    with pytest.raises(PackageError, match=r"format version 7, which a reader of format 6 reads.*upgrade onnx-lora"):
        parse_manifest(later, FILE)


@pytest.mark.parametrize("needed", [0, -1, "5", None, True, 5.0])
def test_a_minimum_reader_that_is_no_version_is_refused(package: Package, needed: object) -> None:
    with pytest.raises(PackageError, match="minimum_reader must be a format version"):
        parse_manifest(_data(package) | {"minimum_reader": needed}, FILE)


def test_without_a_minimum_reader_the_writers_own_version_counts(package: Package) -> None:
    data = _data(package)
    del data["minimum_reader"]
    assert parse_manifest(data, FILE) == package.manifest
    with pytest.raises(PackageError, match="upgrade onnx-lora"):
        parse_manifest(data | {"format_version": FORMAT_VERSION + 1}, FILE)


@pytest.mark.parametrize(
    "place, name, message",
    [
        ("points", "kind", r"graphs\[0\]\.points\[0\]\.kind is 'maze', and known are linear, embedding, conv"),
        ("replaceable", "role", r"replaceable\[0\]\.role is 'maze', and known are linear_weight, linear_bias, table"),
    ],
)
def test_an_unknown_kind_or_role_is_refused_by_name(package: Package, place: str, name: str, message: str) -> None:
    data = _data(package)
    data["graphs"][0][place][0][name] = {"name": "maze"}
    with pytest.raises(PackageError, match=message + ".*upgrade onnx-lora"):
        parse_manifest(data, FILE)


def test_a_whole_weight_of_another_shape_than_its_roles_is_refused(package: Package) -> None:
    for index, shape in ((0, [4]), (1, [2, 2])):
        data = _data(package)
        data["graphs"][0]["replaceable"][index]["shape"] = shape
        (package.path / "onnx_lora.json").write_text(json.dumps(data))
        with pytest.raises(PackageError, match=r"head\.(weight|bias): a linear module's (weight|bias) must have"):
            Package.open(package.path)


def test_the_lowest_reader_is_todays(package: Package) -> None:
    assert package.manifest.minimum_reader == FORMAT_VERSION


def test_a_new_kind_raises_the_lowest_reader(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lora.manifest._NEW_NAMES", {Conv: FORMAT_VERSION + 1})
    assert package.manifest.minimum_reader == FORMAT_VERSION
    monkeypatch.setattr("onnx_lora.manifest._NEW_NAMES", {Linear: FORMAT_VERSION + 1})
    assert package.manifest.minimum_reader == FORMAT_VERSION + 1


@dataclass(frozen=True)
class Later:
    name: str
    remark: str = ""
    folded: bool = field(default=False, metadata={NEEDED_SINCE: 6})


def test_a_new_field_counts_only_where_it_says_something() -> None:
    codec = Codec({})
    assert codec.needed_since((Later("a"), Later("b", remark="new"))) == 0
    assert codec.needed_since((Later("a"), Later("b", folded=True))) == 6


def test_what_is_written_is_of_todays_format(package: Package) -> None:
    old = Manifest(3, "somebody", {}, package.manifest.graphs)
    assert json.loads(old.to_json())["format_version"] == FORMAT_VERSION
