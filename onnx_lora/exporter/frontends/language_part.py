"""Models that read pictures or speech beside text: the language model within such a class, as the text-only class that
computes the same. It exports nothing.

Exporters write the graphs of text-only classes. Adapters are trained on the whole class, whose names a package has, and
whose answers to text alone its graph must give."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from onnx_lora.errors import ModelError
from onnx_lora.exporter.foreign_libraries import Failure, attempt

__all__ = ["LanguagePart", "find_text_class", "language_part_of", "others_than"]

logger = logging.getLogger(__name__)

# Types of language models that have no class for text alone, and the type that computes the same of text. Their rotary
# positions have three axes (time, height, width), which are one number for every token of a text.
_SAME_FOR_TEXT: Mapping[str, str] = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}

# What such rotary positions are called in `rope_scaling`; anything else there scales them too.
_UNSCALED = ("default", "mrope", None)
_OF_THREE_AXES = frozenset({"type", "rope_type", "mrope_section", "mrope_interleaved"})

# How far two orders of adding the same products may be apart, relative to the largest logit: in float32, and in less.
_ROUNDING, _ROUNDING_IN_HALF = 1e-4, 2e-2

# A text to compare on, with some of its beginning masked in one row.
_ROWS, _LENGTH, _MASKED = 2, 8, 2


@dataclass(frozen=True, slots=True)
class LanguagePart:
    """The language model of a larger one. `model`: of the text-only class, with the same tensors. `left_out`: the other
    parts, by the names of their modules."""

    model: Any
    left_out: tuple[str, ...]

    def as_record(self, name: str) -> dict[str, str]:
        """What a manifest says of what is left out; it is logged, too. `name`: the checkpoint's."""
        parts = ", ".join(self.left_out)
        logger.warning("%s: its language model is exported, for text alone; the package leaves out %s", name, parts)
        return {"language_model": type(self.model).__name__, "left_out": parts}


def find_text_class(theirs: Any) -> str | None:
    """The text-only class of transformers for the language model within a class for pictures or speech, by
    transformers' config of it; None: it is another sort of model, or there is no such class."""
    named = (getattr(theirs, "architectures", None) or [""])[0]
    if theirs.is_encoder_decoder or not named.endswith("ForConditionalGeneration"):
        return None
    text = theirs.get_text_config(decoder=True)
    if text is theirs or text.is_encoder_decoder:
        return None
    # Only now: it imports torch.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    found = CLASSES.get(_SAME_FOR_TEXT.get(text.model_type, text.model_type))
    return found if isinstance(found, str) else None


def language_part_of(model: Any, path: str | os.PathLike[str]) -> LanguagePart:
    """The language part of a loaded model of which `find_text_class` knows the class.

    Raises ModelError: its class computes something else of a text than the text-only class.
    """
    import torch
    import transformers

    name = find_text_class(model.config)
    assert name is not None  # as the caller asked
    kind = getattr(transformers, name)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = _config_for(kind, model.config.get_text_config(decoder=True), path)
    config.tie_word_embeddings = head.weight is embeddings.weight
    config.architectures = [name]
    with torch.device("meta"):
        empty = kind(config)
    inner = empty.get_decoder()
    body = _find_body(model, set(inner.state_dict()))
    if body is None:
        raise _unlike(name, "has other weights than", path)
    tensors = _under(_name_of(empty, inner), model.get_submodule(body))
    tensors |= _under(_name_of(empty, empty.get_output_embeddings()), head)
    text, account = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=model.dtype, output_loading_info=True
    )
    if account["missing_keys"] or account["mismatched_keys"] or account["unexpected_keys"]:
        raise _unlike(name, "has other weights than", path)
    text.eval()
    text.generation_config = copy.deepcopy(model.generation_config)
    if not _answer_alike(model, text, path):
        raise _unlike(name, "computes something else of a text than", path)
    return LanguagePart(text, others_than(model, (body, _name_of(model, head))))


def _unlike(name: str, difference: str, path: str | os.PathLike[str]) -> ModelError:
    return ModelError(
        f"must have {name} within, of which exporters can write a graph, and its language model {difference} that "
        "class (it scales, masks or places tokens in a way of its own); give a graph of your own to `attach`, with "
        "this checkpoint",
        path=path,
    )


def _config_for(kind: Any, text: Any, path: str | os.PathLike[str]) -> Any:
    """The config of a text-only class. Raises ModelError: it cannot say what the larger model's says."""
    if text.model_type not in _SAME_FOR_TEXT:
        return copy.deepcopy(text)
    fields = text.to_dict()
    del fields["model_type"]
    rope = fields.pop("rope_scaling", None) or {}
    scaling = rope.get("rope_type", rope.get("type"))
    if scaling not in _UNSCALED or not set(rope) <= _OF_THREE_AXES:
        raise ModelError(f"its rotary positions must not be scaled, and are: {rope!r}", path=path)
    return kind.config_class(**fields)


def _find_body(model: Any, wanted: set[str]) -> str | None:
    """The module within that has the tensors of these names, or None."""
    found: list[str] = []
    for name, module in model.named_modules():
        if set(module.state_dict()) == wanted:
            found.append(name)
    return found[0] if len(found) == 1 else None


def _under(prefix: str, module: Any) -> dict[str, Any]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _name_of(model: Any, wanted: Any) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    raise AssertionError("the module is the model's own")


def _answer_alike(model: Any, text: Any, path: str | os.PathLike[str]) -> bool:
    """Whether two models have the same logits for one text. Raises ModelError: the larger one takes no text alone."""
    import torch

    vocabulary = int(text.get_input_embeddings().weight.shape[0])
    # No token may stand for a picture: those of low numbers, of which only bytes and signs have some.
    ids = torch.arange(_ROWS * _LENGTH).reshape(_ROWS, _LENGTH) % vocabulary
    mask = torch.ones_like(ids)
    mask[-1, :_MASKED] = 0
    with torch.inference_mode():
        theirs = attempt(lambda: model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
        if isinstance(theirs, Failure):
            raise ModelError(f"must take a text without pictures, and does not: {theirs.line}", path=path)
        ours = text(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    rounding = _ROUNDING if model.dtype == torch.float32 else _ROUNDING_IN_HALF
    return bool((theirs - ours).abs().max() <= rounding * theirs.abs().max())


def others_than(model: Any, kept: Collection[str]) -> tuple[str, ...]:
    """The parts of a model that hold weights and none of what is kept, by the names of their modules."""
    left_out: list[str] = []
    for name, module in model.named_children():
        left_out += _parts_of(name, module, kept)
    return tuple(left_out)


def _parts_of(name: str, module: Any, kept: Collection[str]) -> list[str]:
    if name in kept or not any(True for _ in module.parameters()):
        return []
    if not any(one.startswith(f"{name}.") for one in kept):
        return [name]
    parts: list[str] = []
    for inner, child in module.named_children():
        parts += _parts_of(f"{name}.{inner}", child, kept)
    return parts
