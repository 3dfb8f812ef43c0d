"""Writes what Optimum exports for which model, so that an unknown task is refused before torch is loaded.

`python scripts/optimum_tasks.py` prints the table; `--write` puts it in its place. A test compares it with Optimum's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "onnx_lora" / "exporter" / "frontends" / "exporters" / "optimum_tasks.json"


def make_table() -> dict[str, Any]:
    """Tasks by type of model, and the other names that tasks have."""
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.tasks import TasksManager

    tasks: dict[str, list[str]] = {}
    for kind, libraries in TasksManager._SUPPORTED_MODEL_TYPE.items():
        tasks[kind] = sorted(libraries.get("onnx", {}))
    return {"synonyms": dict(sorted(TasksManager._SYNONYM_TASK_MAP.items())), "tasks": dict(sorted(tasks.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    table = make_table()
    lines = [f' "{kind}": {json.dumps(tasks)}' for kind, tasks in table["tasks"].items()]
    synonyms = json.dumps(table["synonyms"], indent=1)
    body = ",\n".join(lines)
    text = f'{{"synonyms": {synonyms},\n"tasks": {{\n{body}\n}}}}\n'
    if parser.parse_args().write:
        TABLE.write_text(text, "utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
