"""Adapters written in every format, whole or not at all; and from format to format without a change of what they do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnx_lora import Package, bind, read_adapter
from onnx_lora.adapters import Adapter, BoundAdapter, Delta, MatrixDelta
from onnx_lora.adapters.compose import make_blend
from onnx_lora.adapters.methods.ia3 import IA3
from onnx_lora.adapters.methods.loha import LoHa
from onnx_lora.adapters.methods.products import Product
from onnx_lora.adapters.write import FORMATS, write_adapter, write_bound
from onnx_lora.errors import BindError, InputError, OutputExistsError, StorageError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, Conv
from onnx_lora.points import InjectionPoint, digest
from tests.adapters.building import PackageBuilder, adapter, delta, effect, lora, numbers, peft_folder
from tests.support.numbers import assert_close, assert_same_bits

PLAIN: list[str] = ["peft", "diffusers", "kohya", "mlx"]


def add_conv(builder: PackageBuilder, module: str, shape: tuple[int, ...], *, groups: int = 1) -> None:
    """A point on a convolution with a weight of torch's `shape`."""
    weight = numbers(*shape, seed=50)
    part = replace(builder._store(f"{module}.w", weight), outputs=shape[0], transposed=True)
    inputs, kernel = math.prod(shape[1:]) * groups, shape[2:]
    own = digest(weight)
    builder.points.append(InjectionPoint(module, inputs, shape[0], "float32", True, own, (part,), Conv(kernel, groups)))


def add_table(builder: PackageBuilder, module: str, rows: int, features: int) -> None:
    """A point on an embedding."""
    weight = numbers(rows, features, seed=51)
    part = builder._store(f"{module}.w", weight)
    own = digest(weight)
    builder.points.append(InjectionPoint(module, rows, features, "float32", True, own, (part,), EMBEDDING))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    builder = PackageBuilder(tmp_path / "package")
    builder.point("unet.q", 4, 6).point("unet.v", 4, 6)
    add_conv(builder, "unet.conv", (6, 4, 3, 3))
    add_table(builder, "unet.table", 9, 5)
    builder.weight("unet.head.weight", 4, 6).bias("unet.head.bias", 6).whole("unet.norm", 4)
    return builder.open()


LINEAR = {"unet.q": Delta(numbers(2, 4), numbers(6, 2), 0.3), "unet.v": Delta(numbers(3, 4), numbers(6, 3), 0.7)}
KINDS = LINEAR | {
    "unet.conv": Delta(numbers(2, 4, 3, 3), numbers(6, 2), 0.5, Conv((3, 3))),
    "unet.table": Delta(numbers(2, 9), numbers(5, 2), 0.5, EMBEDDING),
}


def assert_same_effect(actual: BoundAdapter, expected: BoundAdapter) -> None:
    assert actual.coverage.applied == expected.coverage.applied
    for module in expected.coverage.applied:
        assert_close(effect(actual.tensors, module), effect(expected.tensors, module))


@pytest.mark.parametrize("first", PLAIN)
@pytest.mark.parametrize("second", PLAIN)
def test_from_format_to_format_the_effect_is_the_same(
    tmp_path: Path, package: Package, first: str, second: str
) -> None:
    once = write_adapter(adapter(LINEAR), tmp_path / f"once{FORMATS[first]}", format=first)
    twice = write_adapter(read_adapter(once), tmp_path / f"twice{FORMATS[second]}", format=second, package=package)
    assert_same_effect(bind(read_adapter(twice), package), bind(adapter(LINEAR), package))


def test_peft_to_our_file_and_back_binds_to_the_same_bits(tmp_path: Path, package: Package) -> None:
    whole = {"unet.head.weight": numbers(6, 4, seed=4), "unet.head.bias": numbers(6, seed=5)}
    first = bind(adapter(KINDS, whole), package)
    ours = write_bound(first, tmp_path / "ours.safetensors")
    folder = write_adapter(read_adapter(ours), tmp_path / "peft", format="peft", package=package)
    again = bind(read_adapter(folder), package)
    assert again.tensors.keys() == first.tensors.keys()
    for name, tensor in first.tensors.items():
        assert_same_bits(again.tensors[name], tensor)


def test_dora_goes_through_our_file_too(tmp_path: Path, package: Package) -> None:
    own = adapter({"unet.q": Delta(numbers(2, 4), numbers(6, 2), 0.3, magnitude=np.abs(numbers(6)) + 1)})
    ours = write_bound(bind(own, package), tmp_path / "ours.safetensors")
    folder = write_adapter(read_adapter(ours), tmp_path / "peft", format="peft", package=package)
    again, first = bind(read_adapter(folder), package), bind(own, package)
    for name, tensor in first.tensors.items():
        assert_same_bits(again.tensors[name], tensor)


def test_a_convolution_in_groups_goes_through_our_file_too(tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "package")
    add_conv(builder, "conv", (6, 2, 3, 3), groups=2)
    package = builder.open()
    own = adapter({"conv": Delta(numbers(4, 4, 3, 3), numbers(6, 2), 0.5, Conv((3, 3), 2))})
    ours = write_bound(bind(own, package), tmp_path / "ours.safetensors")
    folder = write_adapter(read_adapter(ours), tmp_path / "peft", format="peft", package=package)
    assert_same_effect(bind(read_adapter(folder), package), bind(own, package))


def test_a_blend_is_written_as_one_adapter(tmp_path: Path, package: Package) -> None:
    parts = [(bind(adapter({"unet.q": delta(4, 6)}), package), 0.5), (bind(adapter(LINEAR), package), 2.0)]
    both = make_blend(parts, name="both")
    folder = write_adapter(both, tmp_path / "both", format="peft", package=package)
    assert_same_effect(bind(read_adapter(folder), package), both)


def test_a_change_that_this_base_makes_factors_of_is_written_as_them(tmp_path: Path, package: Package) -> None:
    one = Product(numbers(6, 1), numbers(1, 4, seed=1))
    own = adapter({}, changes={"unet.q": LoHa(one, one, 0.5)})
    folder = write_adapter(own, tmp_path / "out", format="peft", package=package)
    assert_same_effect(bind(read_adapter(folder), package), bind(own, package))


# --- refusals ----------------------------------------------------------------------------------

FLAT = adapter({"unet_q": delta(4, 6)}, flat_names=True)
CHANGED = adapter({}, changes={"unet.q": IA3(numbers(6), False)})
OURS = adapter({"unet.q": MatrixDelta(numbers(2, 4), numbers(6, 2), 1.0)})


@pytest.mark.parametrize(
    "own, words",
    [
        (FLAT, "its names have `_` for `.`"),
        (CHANGED, "unet.q: whether IA3 is a pair of factors depends on the base's weights"),
        (OURS, "unet.q: only a package says whether it is a linear module, a convolution or an embedding"),
    ],
)
def test_what_only_a_package_can_tell_asks_for_it(tmp_path: Path, own: Adapter, words: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write_adapter(own, tmp_path / "out", format="peft")
    assert words in str(caught.value)
    assert "`package=...`" in str(caught.value)


@pytest.mark.parametrize(
    "own, words",
    [
        (CHANGED, "unet.q: IA3 changes the weight in a way that no pair of factors expresses; fold the adapter"),
        (adapter({}, changes={"unet.q": IA3(numbers(6), True)}), "fold the adapter into the model instead"),
    ],
)
def test_what_no_factors_express_is_refused_by_name(tmp_path: Path, package: Package, own: Adapter, words: str) -> None:
    with pytest.raises((UnsupportedAdapterError, BindError)) as caught:
        write_adapter(own, tmp_path / "out", format="peft", package=package)
    assert "unet.q" in str(caught.value)
    assert words in str(caught.value) or "IA3 must meet" in str(caught.value)


def test_a_bound_scale_of_outputs_is_no_pair_of_factors(tmp_path: Path, package: Package) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"unet\.q: has a factor for each output"):
        write_adapter(bind(CHANGED, package), tmp_path / "out", format="peft", package=package)


def test_an_adapter_that_does_not_fit_the_package_is_refused_before_anything_is_written(
    tmp_path: Path, package: Package
) -> None:
    with pytest.raises(BindError, match=r"other: the package has no such module"):
        write_adapter(adapter({"other": delta(4, 6)}), tmp_path / "out", format="peft", package=package)
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


@pytest.mark.parametrize("format", ["safetensors", "onnx_adapter"])
def test_graph_inputs_need_the_package(tmp_path: Path, format: str) -> None:
    with pytest.raises(InputError, match="give that package"):
        write_adapter(adapter(LINEAR), tmp_path / "out", format=format)


def test_a_bound_adapter_needs_its_package(tmp_path: Path, package: Package) -> None:
    bound = bind(adapter(LINEAR), package)
    for own in (bound, read_adapter(write_bound(bound, tmp_path / "ours.safetensors"))):
        with pytest.raises(InputError, match="need the package that it is bound to"):
            write_adapter(own, tmp_path / "out", format="peft")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the format must be one of safetensors, onnx_adapter, peft"):
        write_adapter(adapter(LINEAR), tmp_path / "out", format="pickle")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", PLAIN)
def test_a_taken_place_is_left_as_it_is(tmp_path: Path, format: str) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        write_adapter(adapter(LINEAR), tmp_path / "out", format=format)
    with pytest.raises(StorageError, match="nothing was written"):
        write_adapter(adapter(LINEAR), tmp_path / "out" / "below", format=format)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("format", PLAIN)
def test_a_place_that_takes_no_files_says_so(format: str) -> None:
    with pytest.raises(StorageError, match="nothing was written"):
        write_adapter(adapter(LINEAR), "/proc/out", format=format)


def test_an_initial_adapter_goes_with_peft_only(tmp_path: Path) -> None:
    file = write_adapter(adapter(LINEAR), tmp_path / "x.safetensors", format="kohya")
    with pytest.raises(InputError, match="an initial adapter goes with a PEFT folder only"):
        read_adapter(file, initial=peft_folder(tmp_path / "initial", lora("m.q", 4, 6)))
