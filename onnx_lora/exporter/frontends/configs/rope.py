"""Rotary embeddings as transformers 5 writes them into a config (`rope_parameters`), translated into the fields that
transformers 4 reads. It knows the dictionaries of configs alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["RopeError", "rope_fields"]

# What version 4 calls the base and the rotated part of a head. A class of configs reads the first of these names that
# it has; GPT-NeoX's class has several, and computes the others from the first.
_THETA = ("rotary_emb_base", "rope_theta")
_PART = ("rotary_pct", "partial_rotary_factor")

# Kinds that version 4 computes by the same formula, and what each must say.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_FULL, _SLIDING = "full_attention", "sliding_attention"


class RopeError(ValueError):
    """Version 4 has no fields for what a config says."""


def rope_fields(config: Mapping[str, Any], known: Mapping[str, object]) -> dict[str, Any]:
    """The fields of version 4 that say what `config["rope_parameters"]` says. `known`: the fields of version 4's
    class, with their defaults.

    Raises RopeError: its class cannot be told.
    """
    parameters = config["rope_parameters"]
    layers = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if not layers:
        return _flat(config, parameters, known)
    if len(layers) != len(parameters) or set(layers) != {_FULL, _SLIDING}:
        raise RopeError(f"there must be parameters for {_FULL} and {_SLIDING}, and there are {sorted(parameters)}")
    for name in ("rope_local_base_freq", "local_rope_theta"):
        if name in known:
            return _local(config, layers, name, known)
    fields = _flat(config, layers[_FULL], known)
    if layers[_FULL] != layers[_SLIDING] or fields["rope_scaling"] is not None:
        raise RopeError("layers with and without a window must be alike in version 4, and of the default kind")
    return fields


def _local(
    config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], name: str, known: Mapping[str, object]
) -> dict[str, Any]:
    """Gemma 3's and ModernBERT's, where layers with a window have a base of their own, and nothing else."""
    local = dict(layers[_SLIDING])
    theta = local.pop("rope_theta", None)
    is_default = local.pop("rope_type", "default") == "default"
    turns_whole_heads = is_default and local.pop("partial_rotary_factor", 1.0) == 1.0
    if local or not turns_whole_heads:
        raise RopeError(f"{_SLIDING} must have nothing but a base in version 4, and has {sorted(local) or 'a kind'}")
    full = layers[_FULL]
    if name == "local_rope_theta" and full.get("rope_type", "default") != "default":
        raise RopeError(f"{_FULL} must be of the default kind in version 4, and is {full.get('rope_type')!r}")
    fields = _flat(config, full, known) | {name: _number(theta)}
    if "global_rope_theta" in known:
        fields["global_rope_theta"] = fields.pop("rope_theta")
        fields.pop("rope_scaling")
    return fields


def _flat(config: Mapping[str, Any], parameters: Mapping[str, Any], known: Mapping[str, object]) -> dict[str, Any]:
    """One for all layers: the base, the part of a head that turns, and a kind with what belongs to it."""
    rest = {name: value for name, value in parameters.items() if value is not None}
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    rest.pop("type", None)
    if kind not in _KINDS:
        raise RopeError(f"version 4 knows the kinds {', '.join(_KINDS)}, and this is {kind!r}")
    missing = [name for name in _KINDS[kind] if name not in rest]
    if missing:
        raise RopeError(f"{kind} must say {' and '.join(missing)}")
    theta_name = _own(_THETA, known, "a base")
    fields: dict[str, Any] = {theta_name: _number(rest.pop("rope_theta", None))}
    fields |= _part(config, rest.pop("partial_rotary_factor", None), known)
    if kind == "longrope":
        fields |= _longrope(config, rest)
    if kind == "default" and not rest:
        return fields | {"rope_scaling": None}
    if "rope_scaling" not in known:
        raise RopeError(f"version 4 has no kinds for this model, and this is {kind!r}")
    scaling = {"rope_type": kind, **rest}
    if kind == "longrope" and "original_max_position_embeddings" in known:
        # Phi-3's class wants exactly three entries, under the oldest name of the kind.
        scaling = {"type": kind, **rest}
    return fields | {"rope_scaling": scaling}


def _part(config: Mapping[str, Any], part: object, known: Mapping[str, object]) -> dict[str, Any]:
    """The part of each head that turns: all of it unless said otherwise, whatever version 4's default is."""
    if part is None:
        said = [config[name] for name in _PART if config.get(name) is not None]
        part = said[0] if said else 1.0
    for name in _PART:
        if name in known:
            return {name: _number(part)}
    if part != 1.0:
        raise RopeError(f"version 4 turns whole heads of this model, and partial_rotary_factor is {part!r}")
    return {}


def _longrope(config: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Longrope's original length, which version 4 reads from the config itself and computes the factor from; both leave
    `rest`."""
    original = rest.pop("original_max_position_embeddings")
    length = _number(config.get("max_position_embeddings"))
    ratio = length / _number(original)
    factor = rest.pop("factor", ratio)
    if "attention_factor" not in rest and not math.isclose(_number(factor), ratio):
        raise RopeError(f"version 4 takes {ratio:g} for the factor of longrope, and it is {factor!r}")
    return {"original_max_position_embeddings": original}


def _own(names: Collection[str], known: Collection[str], what: str) -> str:
    """The first of the names that version 4's class knows; `what` is what it means."""
    for name in names:
        if name in known:
            return name
    raise RopeError(f"version 4 can be told no {what} for this model")


def _number(value: object) -> float:
    """A value, checked to be a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise RopeError(f"must hold numbers above 0, and holds {value!r}")
    return value
