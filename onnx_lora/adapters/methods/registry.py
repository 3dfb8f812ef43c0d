"""The methods that are read, by `peft_type`: ours, and those that other distributions bring.

A method of ours is one file beside this one and one line here. Others declare an entry point of the group
`onnx_lora.methods`, the `peft_type` as its name and an object of class `Method` as its value.
"""

from __future__ import annotations

from onnx_lora.adapters.methods.method import Method
from onnx_lora.adapters.plugins import Plugins

__all__ = ["METHODS"]

_HERE = "onnx_lora.adapters.methods"

# The order is that of the table in docs/adapters.md.
METHODS: Plugins[Method] = Plugins(
    "onnx_lora.methods",
    Method,
    {
        "LORA": f"{_HERE}.lora:METHOD",
        "ADALORA": f"{_HERE}.adalora:METHOD",
        "BEFT": f"{_HERE}.beft:METHOD",
        "BOFT": f"{_HERE}.boft:METHOD",
        "C3A": f"{_HERE}.c3a:METHOD",
        "DELORA": f"{_HERE}.delora:METHOD",
        "FOURIERFT": f"{_HERE}.fourierft:METHOD",
        "GRALORA": f"{_HERE}.gralora:METHOD",
        "HIRA": f"{_HERE}.hira:METHOD",
        "HRA": f"{_HERE}.hra:METHOD",
        "IA3": f"{_HERE}.ia3:METHOD",
        "LN_TUNING": f"{_HERE}.ln_tuning:METHOD",
        "LOHA": f"{_HERE}.loha:METHOD",
        "LOKR": f"{_HERE}.lokr:METHOD",
        "MISS": f"{_HERE}.miss:METHOD",
        "OFT": f"{_HERE}.oft:METHOD",
        "PVERA": f"{_HERE}.pvera:METHOD",
        "RANDLORA": f"{_HERE}.randlora:METHOD",
        "SHIRA": f"{_HERE}.shira:METHOD",
        "SUPERTUNING": f"{_HERE}.supertuning:METHOD",
        "TRAINABLE_TOKENS": f"{_HERE}.tokens:METHOD",
        "VBLORA": f"{_HERE}.vblora:METHOD",
        "VERA": f"{_HERE}.vera:METHOD",
    },
    guard=f"{_HERE}.foreign:guard_method",
)
