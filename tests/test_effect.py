"""How far an adapter moves each weight: the numbers, the picture, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from onnx_lora import bind
from onnx_lora.adapters import Delta, MatrixDelta
from onnx_lora.adapters.effect import effects
from onnx_lora.cli import cli
from onnx_lora.errors import PluginError
from onnx_lora.heat import Heat
from onnx_lora.kinds import Kind
from onnx_lora.points import Array
from onnx_lora.runtime.merge import fold_weight, plan_edits
from tests.adapters.building import PackageBuilder, adapter, delta, lora, numbers, peft_folder


def test_the_effect_is_the_change_over_the_base(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "p").point("l.0.q", 4, 6).point("l.0.v", 4, 6).point("l.1.q", 4, 6).open()
    plain, scaled = delta(4, 6, scale=0.5), delta(4, 6, seed=5)
    magnitude = Delta(scaled.a, scaled.b, 1.0, magnitude=numbers(6, seed=9))
    moved = effects(bind(adapter({"l.0.q": plain, "l.1.q": magnitude}), package), package)
    w0 = {name: package.module_weight(point).astype(np.float64) for name, point in package.points.items()}
    changed = w0["l.1.q"] + (scaled.b @ scaled.a).T
    dora = changed * (numbers(6, seed=9) / np.linalg.norm(changed, axis=0)) - w0["l.1.q"]
    assert moved == {
        "l.0.q": pytest.approx(np.linalg.norm(0.5 * plain.b @ plain.a) / np.linalg.norm(w0["l.0.q"])),
        "l.1.q": pytest.approx(np.linalg.norm(dora) / np.linalg.norm(w0["l.1.q"]), rel=1e-5),
    }


def test_layers_are_rows_and_modules_columns() -> None:
    heat = Heat.of("t", {"m.layers.0.attn.q": 0.5, "m.layers.1.attn.q": 1.0, "m.layers.1.mlp": 0.25, "head": 2.0})
    assert heat.rows == ("m.layers.0", "m.layers.1", "")
    assert heat.columns == ("attn.q", "mlp", "head")
    assert heat.highest == 2.0
    console = Console(width=100, record=True, force_terminal=True)
    console.print(heat.table())
    text = console.export_text()
    assert "m.layers.1" in text
    assert "0.25" in text


@pytest.mark.parametrize("name", ["heat.png", "heat.svg"])
def test_inspect_draws_and_prints(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    PackageBuilder(tmp_path / "p").point("m.0.q", 4, 6).open()
    folder = peft_folder(tmp_path / "a", lora("m.0.q", 4, 6))
    arguments = ["inspect", str(folder), "--package", str(tmp_path / "p"), "--plot", str(tmp_path / name)]
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert set(json.loads(result.stdout)["effect"]) == {"m.0.q"}
    assert (tmp_path / name).stat().st_size > 1000
    (tmp_path / name).unlink()
    assert "‖ΔW‖" in CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", "p", name])


@dataclass(frozen=True)
class Stretched:
    """Another distribution's method that makes one row of a weight, which NumPy would stretch to all of them."""

    made: Callable[[Array], Any]
    method: str = "Stretched"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        return None

    def apply_to(self, weight: Array) -> Array:
        return self.made(weight)  # type: ignore[no-any-return]

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return None

    def output_scale(self) -> Array | None:
        return None


@pytest.mark.parametrize(
    "made, found",
    [
        (lambda weight: weight[:1], r"float32 of shape \(1, 4\)"),
        (lambda weight: weight[:, :1], r"float32 of shape \(6, 1\)"),
        (lambda weight: weight.astype(np.int64), r"int64 of shape \(6, 4\)"),
        (lambda weight: 1.0, "float"),
    ],
)
def test_a_weight_of_another_shape_is_not_stretched(tmp_path: Path, made: Callable[[Array], Any], found: str) -> None:
    package = PackageBuilder(tmp_path / "p").point("l.0.q", 4, 6).open()
    bound = bind(replace(adapter(None), changes={"l.0.q": Stretched(made)}), package)
    with pytest.raises(PluginError, match=f"'Stretched' must make .*{found}"):
        effects(bound, package)
    (edit,) = plan_edits(package.graph(), bound)
    with pytest.raises(PluginError, match=f"'Stretched' must make .*{found}"):
        fold_weight(edit, package)
