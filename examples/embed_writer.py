"""Puts what `train_writer.py` trained where the demo looks for it: the base in 8 bits as ONNX Runtime GenAI's builder
writes it, and the adapters as PEFT saved them.

    python examples/embed_writer.py --trained writer
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click

from onnx_lora.demo_text import WRITER
from onnx_lora.exporter import export

# Of a package, what the demo attaches its points to, and what text needs.
_MODEL = ("genai_config.json", "model.onnx.data", "tokenizer.json", "tokenizer_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

# What every style is shown with, and what the base writes.
_PROMPT, _BASE = "The king", "Plain English: films, questions, errands."


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--trained", type=click.Path(path_type=Path, exists=True), required=True, help="OUT of train_writer.py.")
def main(trained: Path) -> None:
    shutil.rmtree(WRITER, ignore_errors=True)
    (WRITER / "model").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        package = export(trained / "checkpoint", Path(scratch) / "package", via="genai", precision="int8")
        shutil.copyfile(package.path / package.graph().base_file, WRITER / "model" / "model.onnx")
        for name in _MODEL:
            shutil.copyfile(package.path / name, WRITER / "model" / name)
    styles = json.loads((trained / "tasks.json").read_text("utf-8"))
    for style in styles:
        folder = WRITER / "adapters" / style
        folder.mkdir(parents=True)
        for name in _ADAPTER:
            shutil.copyfile(trained / "adapters" / style / name, folder / name)
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        config["base_model_name_or_path"] = "onnx-lora demo writer"  # not a path of the machine it was trained on
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    facts = {"prompt": _PROMPT, "base": {"says": _BASE}, "adapters": styles}
    (WRITER / "writer.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
