"""The exporter of checkpoints that this environment has, for tests that hold with any: transformers' own from version 5
on, Optimum's before."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["HAS_OPTIMUM", "VIA", "load_model", "references"]

HAS_OPTIMUM = int(version("transformers").partition(".")[0]) < 5

VIA = "optimum" if HAS_OPTIMUM else "transformers"

if HAS_OPTIMUM:
    from onnx_lora.exporter.frontends.exporters.optimum import load_model, references
else:
    from onnx_lora.exporter.frontends.exporters.transformers import load_model, references
