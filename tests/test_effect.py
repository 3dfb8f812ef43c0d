"""How far an adapter moves each weight: the numbers, the picture, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from onnx_lora import bind
from onnx_lora.adapters import Delta
from onnx_lora.adapters.effect import effects
from onnx_lora.cli import cli
from onnx_lora.heat import Heat
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
