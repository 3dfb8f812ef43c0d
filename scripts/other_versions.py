"""Writes what transformers 4 and transformers 5 call the modules of one checkpoint, where they differ.

No environment has both, so it takes two steps: with transformers 4 `python scripts/other_versions.py --list FILE`, then
with transformers 5 `python scripts/other_versions.py --join FILE`, which prints the table; `--write` puts it in its
place. Two modules are one if both versions keep them in a checkpoint under one name and of one shape. Tests ask the
models of the installed version whether they have the table's names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "onnx_lora" / "adapters" / "other_versions.json"

# A model of few layers has all the names there are.
_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "depth")
_LAYERS = 2

# What a config needs where its own default makes no model.
_SETTINGS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layers_block_type": ["mamba", "attention"], "num_hidden_layers": 2}
}

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# By name in the checkpoint, the parameter that a class keeps there: its name and its shape.
Kept = dict[str, tuple[str, list[int]]]


def classes() -> Iterator[tuple[str, str]]:
    """Every type of model with the classes that transformers loads for it, by name."""
    from transformers.models.auto import modeling_auto

    found: dict[tuple[str, str], None] = {}
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("_NAMES"):
            for kind, of_kind in getattr(modeling_auto, name).items():
                for model in [of_kind] if isinstance(of_kind, str) else of_kind:
                    found[kind, model] = None
    yield from sorted(found)


def make_model(kind: str, class_name: str) -> Any:
    """A model of a class's own config with two layers, without memory for its weights; None: it cannot be made so."""
    import torch
    import transformers

    made = getattr(transformers, class_name, None)
    if made is None or kind not in transformers.CONFIG_MAPPING:
        return None
    for is_shallow in (True, False):
        try:
            config = transformers.CONFIG_MAPPING[kind](**_SETTINGS.get(kind, {}))
            if is_shallow:
                make_shallow(config)
            with torch.device("meta"):
                return made(config)
        except Exception:  # noqa: BLE001 - models that need other libraries, or lists as long as their depth
            continue
    return None


def make_shallow(config: Any) -> None:
    """Tell a config and its parts that they have few layers."""
    for part in [config, *vars(config).values()]:
        for name in _DEPTHS if hasattr(part, "model_type") else ():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(getattr(part, name), _LAYERS))


def kept_by_4(model: Any) -> Kept:
    """As `save_pretrained` of transformers 4 writes it: it has the original names of classes that were taken apart."""
    kept: Kept = {}
    for name, values in model.state_dict().items():
        saved = name
        for original, own in getattr(model, "_checkpoint_conversion_mapping", {}).items():
            plain = re.sub(r"\(.*\)", "", original.lstrip("^"))
            saved, count = re.subn(own, plain, saved)
            if count:
                break
        kept[saved] = name, list(values.shape)
    return kept


def kept_by_5(model: Any, *, with_prefixes: bool) -> Kept:
    """As `save_pretrained` of transformers 5 writes it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if with_prefixes:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False) or None
    own = model.state_dict()
    names = {id(values): name for name, values in own.items()}
    try:
        saved = revert_weight_conversion(model, dict(own))
    except Exception:  # noqa: BLE001 - some of these conversions cannot be undone
        return {}
    return {name: (names[id(kept)], list(kept.shape)) for name, kept in saved.items() if id(kept) in names}


def join(older: Mapping[str, Kept], model: Any, class_name: str) -> dict[str, str]:
    """By the name of a module in transformers 5, its name in 4, for those that are called otherwise."""
    before = older.get(class_name, {})
    tries = [kept_by_5(model, with_prefixes=False), kept_by_5(model, with_prefixes=True)]
    after = max(tries, key=lambda kept: len(kept.keys() & before.keys()))
    pairs: dict[str, set[str]] = {}
    for saved in after.keys() & before.keys():
        (new, new_shape), (old, old_shape) = after[saved], before[saved]
        if last_of(new) == last_of(old) and new_shape == list(old_shape):
            pairs.setdefault(module_of(new), set()).add(module_of(old))
    joined = {new: next(iter(old)) for new, old in pairs.items() if len(old) == 1}
    names = {module_of(name) for name, _ in after.values()}
    for new, old in joined.items():
        # Such a name would be taken for what it is in the newer version.
        if new != old and old in names and joined.get(old) != old:
            raise SystemExit(f"{class_name}: {old} is {new} in transformers 5, and is another module there")
    return joined


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def last_of(parameter: str) -> str:
    return parameter.rpartition(".")[2]


def within_base(names: tuple[str, str], model: Any) -> tuple[str, str]:
    """A module's names as the model without a head has them, if that is in front of both."""
    base = f"{model.base_model_prefix}."
    is_in_base = bool(model.base_model_prefix) and all(name.startswith(base) for name in names)
    new, old = names
    return (new.removeprefix(base), old.removeprefix(base)) if is_in_base else names


def make_table(older: Mapping[str, Kept]) -> dict[str, dict[str, str]]:
    """By type of model: by the newer name of a module, the older one. `#` is a number; the numbers keep their order."""
    table: dict[str, dict[str, str]] = {}
    for kind, class_name in classes():
        model = make_model(kind, class_name)
        if model is None:
            continue
        for names in join(older, model, class_name).items():
            new, old = within_base(names, model)
            if new != old and _NUMBER.findall(new) == _NUMBER.findall(old):
                of_kind = table.setdefault(kind, {})
                newer, older_name = _NUMBER.sub("#", new), _NUMBER.sub("#", old)
                if of_kind.setdefault(newer, older_name) != older_name:
                    raise SystemExit(f"{kind}: {newer} is {of_kind[newer]} in one class and {older_name} in another")
    return {kind: dict(sorted(names.items())) for kind, names in sorted(table.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", type=Path, metavar="FILE", help="write the names of transformers 4")
    parser.add_argument("--join", type=Path, metavar="FILE", help="join them with those of transformers 5")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.list:
        listed = {name: kept_by_4(model) for kind, name in classes() if (model := make_model(kind, name)) is not None}
        options.list.write_text(json.dumps(listed), "utf-8")
        return
    table = make_table(json.loads(options.join.read_text("utf-8")))
    text = json.dumps(table, indent=1) + "\n"
    if options.write:
        TABLE.write_text(text, "utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
