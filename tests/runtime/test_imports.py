"""What importing the runtime needs, and what running packages does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from onnx_lora.adapters import write_bound
from tests.runtime import tiny

# Whatever is no library of a device cannot be imported. ONNX Runtime's own libraries are its own business.
BLOCKED = """
import importlib.abc, sys

MISSING = {"click", "rich", "onnx", "onnx_ir", "torch", "transformers", "peft", "optimum", "sympy", "ml_dtypes",
           "tokenizers", "jinja2", "gguf", "matplotlib", "diffusers"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""

# What a program on a device does: a package's folder, an adapter, and one with a head of another width.
_CALLS = """
import json
import numpy as np
import onnx_lora

folder, adapter, head = sys.argv[1:]
feeds = {"x": np.ones((1, 2, 8), np.float32), "mask": np.ones((1, 2), np.int64)}
session = onnx_lora.AdapterSession(folder)
session.load_adapter("a", adapter)
apart = session.run(None, feeds, adapter="a")[0]
folded = onnx_lora.fold(folder, adapter).run(None, feeds)[0]
found = {"difference": float(abs(apart - folded).max())}
found["measure"] = onnx_lora.measure(folder, adapter, rounds=1).advice.switching
calls = {
    "fold a head of another width": lambda: onnx_lora.fold(folder, head),
    "fold_to": lambda: onnx_lora.fold_to(folder, adapter, folder + "-folded"),
    "attach": lambda: onnx_lora.attach(folder, folder + "-again"),
}
for name, call in calls.items():
    try:
        call()
        found[name] = "done"
    except onnx_lora.MissingDependencyError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_runtime_loads_neither_torch_nor_onnx():
    done = python(
        "import sys, onnx_lora.runtime; print([name for name in ('torch', 'onnx', 'transformers', 'peft') "
        "if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_without_onnxruntime_the_package_imports_and_the_runtime_says_what_to_install():
    done = python(
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import onnx_lora\n"
        "try:\n    onnx_lora.AdapterSession\n"
        "except onnx_lora.OnnxLoraError as error:\n    print(type(error).__name__, error)"
    )
    assert done.stdout.startswith("MissingDependencyError"), done.stderr
    assert "pip install 'onnx-lora[cpu]'" in done.stdout


def test_a_device_runs_folds_and_measures_with_numpy_safetensors_and_onnxruntime(tmp_path: Path) -> None:
    package = tiny.make_package(tmp_path / "package")
    write_bound(tiny.adapter("a", 1), tmp_path / "a.safetensors")
    write_bound(tiny.adapter("head", 2, labels=7), tmp_path / "head.safetensors")
    done = python(BLOCKED + _CALLS, package.path, tmp_path / "a.safetensors", tmp_path / "head.safetensors")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["difference"] < 1e-5
    assert found["measure"] == "delta"
    assert "pip install 'onnx-lora[fold]'" in found["fold a head of another width"]
    assert "pip install 'onnx-lora[fold]'" in found["fold_to"]
    assert "pip install 'onnx-lora[" in found["attach"]


def test_the_command_without_its_libraries_says_so_in_one_line() -> None:
    done = python(BLOCKED + "from onnx_lora.__main__ import main; main()")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == "error: the command onnx-lora needs click; install it: pip install 'onnx-lora[cli]'\n"


def test_a_command_without_rich_says_so_in_one_line() -> None:
    only_click = BLOCKED.replace('{"click", ', "{")
    done = python(only_click + "sys.argv = ['onnx-lora', 'inspect', '.']; from onnx_lora.__main__ import main; main()")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "needs rich; install it: pip install 'onnx-lora[cli]'" in done.stderr
