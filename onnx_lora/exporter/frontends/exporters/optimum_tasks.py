"""What Optimum exports for which type of model, without loading it: a table that `scripts/optimum_tasks.py` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["explain_task"]

_TABLE = Path(__file__).parent / "optimum_tasks.json"


def explain_task(task: str | None, fields: Mapping[str, Any]) -> str | None:
    """Why Optimum does not export a model with these fields of `config.json` for a task; None: it may.

    A type of model that the table lacks may be exported as a part of it is, or be a newer Optimum's: of such only tasks
    are refused that no model has.
    """
    if task is None:
        return None
    synonyms, by_kind = _read_table()
    asked = synonyms.get(task, task)
    kind = str(fields.get("model_type"))
    known = by_kind.get(kind)
    if known is None or "text_config" in fields:
        every = sorted(set().union(*by_kind.values()))
        return None if asked in every else f"there is no task {task!r}; Optimum's are {', '.join(every)}"
    if asked in known:
        return None
    return f"Optimum exports {kind} for {', '.join(known)}, and not for {task!r}"


@cache
def _read_table() -> tuple[Mapping[str, str], Mapping[str, list[str]]]:
    """The tasks that other names stand for, and the tasks of each type of model."""
    table = json.loads(_TABLE.read_text("utf-8"))
    return table["synonyms"], table["tasks"]
