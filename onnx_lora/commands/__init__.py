"""The commands of `onnx-lora`, a file for each group of them. A command reads its arguments, calls one function, and
reports.

`onnx_lora/cli.py` finds them by name, and loads the one that is asked for."""
