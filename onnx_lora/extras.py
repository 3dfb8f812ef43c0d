"""Which extra of this distribution installs an optional library. It knows names, and imports none of them."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EXTRAS", "how_to_install", "how_to_install_for"]

# The smallest extra that declares each library, by the library's import name. A test compares this with pyproject.toml.
EXTRAS: Mapping[str, str] = {
    "click": "cli",
    "diffusers": "diffusion",
    "gguf": "gguf",
    "google": "fold",
    "huggingface_hub": "export",
    "jinja2": "generate",
    "matplotlib": "plot",
    "ml_dtypes": "attach",
    "onnx": "fold",
    "onnx_ir": "attach",
    "onnxruntime": "cpu",
    "onnxruntime_genai": "genai",
    "onnxscript": "export",
    "optimum": "optimum",
    "peft": "export",
    "rich": "cli",
    "sympy": "attach",
    "tokenizers": "generate",
    "torch": "export",
    "transformers": "export",
}

# The extra that brings all that a public name needs, where that is more than the smallest extra of the first library it
# misses: who installs one after the other would install twice.
_EXTRAS_OF_NAMES: Mapping[str, str] = {
    "Checkpoint": "export",
    "OnnxFiles": "attach",
    "Pipeline": "diffusion",
    "TorchModule": "export",
    "attach": "attach",
    "export": "export",
    "quantize": "attach",
    "verify": "export",
}


def how_to_install(module: str) -> str | None:
    """The command that installs what `import module` needs; None: no extra of ours brings it."""
    extra = EXTRAS.get(module.partition(".")[0])
    if extra is None:
        return None
    return f"pip install 'onnx-lora[{extra}]'"


def how_to_install_for(name: str, module: str) -> str | None:
    """The command that installs what the public name needs, which could not import `module`; None: as above."""
    cure = how_to_install(module)
    if cure is None or name not in _EXTRAS_OF_NAMES:
        return cure
    return f"pip install 'onnx-lora[{_EXTRAS_OF_NAMES[name]}]'"
