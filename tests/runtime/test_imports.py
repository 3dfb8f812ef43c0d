"""What importing the runtime needs."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


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
