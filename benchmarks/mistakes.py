"""Twenty ordinary mistakes on the command line: how long each takes to be told, and what is said.

`python -m benchmarks.mistakes` prints a table; `--json` gives data. Each command is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MISTAKES: Sequence[Sequence[str]] = (
    ("export", "./nowhere", "out"),
    ("export", "nobody/nothing", "out"),
    ("export", "adapter", "out"),
    ("export", "package", "out"),
    ("export", "folded", "out"),
    ("export", "llm", "out", "--task", "image-klassification"),
    ("export", "llm", "out", "--targets", "q_prj"),
    ("export", "llm", "package"),
    ("export", "bert", "out", "--precision", "int4"),
    ("attach", "llm", "out"),
    ("attach", "package", "out"),
    ("inspect", "llm"),
    ("fold", "llm", "out", "--adapter", "adapter"),
    ("fold", "package", "out", "--adapter", "llm"),
    ("fold", "package", "llm", "--adapter", "adapter", "--force"),
    ("verify", "package", "--reference", "adapter"),
    ("generate", "folded", "--prompt", "hi"),
    ("run", "package", "--input", "x.npz", "--output", "y.npz", "--adapter", "adapter:strong"),
    ("convert", "llm", "out"),
    ("quantize", "llm", "out"),
)


def make_desk(folder: Path) -> None:
    """Two small checkpoints with random weights, a package, an adapter, a folded model."""
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    from onnx_lora import export, fold_to

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    llm = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads))
    llm.save_pretrained(folder / "llm")
    hf.BertForSequenceClassification(hf.BertConfig(**sizes, **heads)).save_pretrained(folder / "bert")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(llm, config).save_pretrained(folder / "adapter")
    export(folder / "llm", folder / "package", via="optimum", verify=False)
    fold_to(folder / "package", folder / "adapter", folder / "folded")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        make_desk(Path(place))
        for mistake in MISTAKES:
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "onnx_lora", *mistake], cwd=place, capture_output=True, text=True, check=False
            )
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "command": " ".join(mistake),
                    "seconds": round(seconds, 2),
                    "exit_code": done.returncode,
                    "message": done.stderr.strip(),
                }
            )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['seconds']:5.1f} s  onnx-lora {row['command']}\n         {row['message']}")


if __name__ == "__main__":
    main()
