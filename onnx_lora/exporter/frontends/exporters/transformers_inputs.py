"""What a graph of transformers' own exporter is traced with and compared on: example inputs, which of their axes are
free, and what the graph calls them. It makes numbers; it exports nothing.

Inputs and outputs are called as Optimum calls them: `past_key_values.0.key`, `present.0.key`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx_lora.exporter.frontends.quiet import quiet
from onnx_lora.exporter.frontends.source import Reference

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["BATCH", "OWN", "Part", "leaves_of", "parts_of"]

# Sizes of what is traced. None is 1, which would be taken for a constant, and no two that may differ are equal.
_ROWS, _TOKENS, _PAST, _SOURCE, _SAMPLES = 2, 5, 7, 9, 4000

# Of an axis: one symbol for all inputs, or a size that torch finds out.
BATCH, _SEQUENCE, _PAST_LENGTH = "batch_size", "sequence_length", "past_sequence_length"
OWN = "own"

# What leaves of a cache are called, by transformers and by the graph.
_CACHE = re.compile(r"(?:cache|past_key_values)\.(?:(self|cross)_attention_cache\.)?layers\.(\d+)\.([\w.]+)")
_SIDES = {"self": "decoder.", "cross": "encoder.", None: ""}
_LEAVES = {"keys": "key", "values": "value"}

# Those of decoders behind an encoder.
_OF_DECODERS: Mapping[str, str] = {
    "decoder_input_ids": "input_ids",
    "attention_mask": "encoder_attention_mask",
    "encoder_outputs.last_hidden_state": "encoder_hidden_states",
}

# Inputs that models make themselves where they are not given.
_OPTIONAL = ("attention_mask", "position_ids", "token_type_ids")

# Layers whose cache is keys and values of all tokens.
_FULL = "full_attention"
_OF_KEYS = frozenset({_FULL, "sliding_attention", "chunked_attention"})

# The free axes of what an encoder reads, and of a cache's keys and values.
_OF_SOURCE = {0: BATCH, 1: "encoder_sequence_length"}
_KEYS = {0: BATCH, 2: _PAST_LENGTH}


@dataclass(frozen=True, slots=True)
class Part:
    """One graph of a model. `module`: what is traced; `inputs`: its keyword arguments, tensors or caches of tensors;
    `axes`: the free ones of each tensor, by the tensor's path in `inputs`; `names`: the graph's, where they differ from
    the paths."""

    name: str
    module: Any
    inputs: Mapping[str, Any]
    axes: Mapping[str, Mapping[int, str]]
    names: Mapping[str, str] = field(default_factory=dict)

    def graph_name(self, path: str, *, is_output: bool = False) -> str:
        """What the graph calls a tensor in its inputs or outputs."""
        found = _CACHE.fullmatch(path)
        if found is None:
            return path if is_output else self.names.get(path, path)
        side, layer, leaf = found.groups()
        own = _LEAVES.get(leaf, leaf)
        return f"{'present' if is_output else 'past_key_values'}.{layer}.{_SIDES[side]}{own}"

    def gives(self, path: str) -> bool:
        """Whether an output of the module is one of the graph: those that only hand on an input are not."""
        is_kept = _CACHE.fullmatch(path) is not None and ".cross_attention_cache." not in path
        is_handed_on = path in leaves_of(self.inputs) and not is_kept
        return path != "encoder_last_hidden_state" and not is_handed_on

    def reference(self) -> Reference:
        """What the graph is compared with."""

        def feeds(names: Sequence[str]) -> dict[str, Array]:
            flat = {self.graph_name(path): value.numpy() for path, value in leaves_of(self.inputs).items()}
            return {name: value for name, value in flat.items() if name in names}

        def answer() -> dict[str, Array]:
            import torch

            with quiet(), torch.inference_mode():
                # Models write into their cache: every run gets a fresh copy.
                outputs = self.module(**copy.deepcopy(dict(self.inputs)))
            flat: dict[str, Array] = {}
            for path, value in leaves_of(outputs).items():
                if self.gives(path):
                    flat[self.graph_name(path, is_output=True)] = value.numpy()
            return flat

        def left_out(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(path for path in _OPTIONAL if path in self.inputs and self.graph_name(path) not in names)

        def without(names: Sequence[str]) -> Reference:
            kept = {path: value for path, value in self.inputs.items() if path not in names}
            return dataclasses.replace(dataclasses.replace(self, inputs=kept).reference(), dropped=tuple(names))

        return Reference(self.name, feeds, answer, left_out, without)


def leaves_of(values: Any) -> dict[str, Any]:
    """The tensors within inputs or outputs, by their paths: as transformers' exporter names them."""
    from transformers.exporters.utils import get_leaf_tensors

    found: dict[str, Any] = get_leaf_tensors(values)
    return found


def parts_of(model: Any, *, has_cache: bool) -> list[Part]:
    """The graphs of a model: one, or an encoder and its decoder, without and with a cache."""
    import torch

    # The same inputs every time, and the caller's random numbers left alone.
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        if model.config.is_encoder_decoder and model.can_generate():
            return _encoder_decoder(model, has_cache=has_cache)
        return [_whole(model, has_cache=has_cache)]


def _whole(model: Any, *, has_cache: bool) -> Part:
    takes = inspect.signature(model.forward).parameters
    inputs, axes = _own_inputs(model, takes, past=_PAST if has_cache else 0)
    if has_cache:
        cache = {"cache": _fill_cache(model, inputs)}
        inputs |= cache
        axes |= _axes_of_cache(cache)
    return Part("model", model, inputs, axes)


def _own_inputs(
    model: Any, takes: Mapping[str, Any], *, past: int = 0, tokens: int = _TOKENS
) -> tuple[dict[str, Any], dict[str, Mapping[int, str]]]:
    """Inputs for what a model's class reads: text, pictures, sound."""
    inputs: dict[str, Any] = {}
    axes: dict[str, Mapping[int, str]] = {}
    first = model.main_input_name
    reads_text = "input_ids" in takes and first == "input_ids"
    if reads_text:
        inputs |= _text(model, takes, past=past, tokens=tokens)
        for name in inputs:
            axes[name] = {0: BATCH, 1: _SEQUENCE}
        if past and "attention_mask" in inputs:
            axes["attention_mask"] = {0: BATCH, 1: "total_sequence_length"}
    is_pair = hasattr(model.config, "vision_config") and not _is_causal(model)
    if "pixel_values" in takes and (first == "pixel_values" or is_pair):
        inputs["pixel_values"] = _pixels(getattr(model.config, "vision_config", model.config))
        # Pictures beside texts may be more or fewer than these.
        axes["pixel_values"] = {0: f"image_{BATCH}" if reads_text else BATCH, 2: OWN, 3: OWN}
    if first in ("input_values", "input_features"):
        inputs[first] = _sound(model.config, first)
        axes[first] = {0: BATCH} if inputs[first].ndim == 3 else {0: BATCH, 1: OWN}
    return inputs, axes


def _text(model: Any, takes: Mapping[str, Any], *, past: int, tokens: int) -> dict[str, Any]:
    """Tokens, a mask that leaves out some of them in the last row, and what follows from both."""
    import torch

    config = getattr(model.config, "text_config", model.config)
    is_causal = _is_causal(model)
    ids = _tokens(config, tokens)
    mask = torch.ones(_ROWS, past + tokens, dtype=torch.int64)
    padding = slice(0, 2) if is_causal else slice(-2, None)
    mask[-1, padding] = 0
    own = mask[:, past:]
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if isinstance(pad, int) and 0 <= pad < config.vocab_size:
        ids[own == 0] = pad
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        for row, kept in zip(ids, own, strict=True):
            row[kept.nonzero()[-1]] = end  # some classifiers look for it
    inputs = {"input_ids": ids}
    if "attention_mask" in takes:
        inputs["attention_mask"] = mask
    if "position_ids" in takes and is_causal:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, past:].contiguous()
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, ids.shape)
    return inputs


def _tokens(config: Any, count: int) -> Any:
    """Tokens `[rows, count]`. None stands for a picture: of those all have high numbers."""
    import torch

    return torch.randint(3, max(config.vocab_size // 2, 4), (_ROWS, count))


def _pixels(config: Any) -> Any:
    import torch

    size = getattr(config, "image_size", None) or 64
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(_ROWS, getattr(config, "num_channels", 3), height, width)


def _sound(config: Any, name: str) -> Any:
    import torch

    if name == "input_values" and not hasattr(config, "num_mel_bins"):
        return torch.randn(_ROWS, _SAMPLES)
    bins = config.num_mel_bins
    if hasattr(config, "max_source_positions"):
        return torch.randn(_ROWS, bins, 2 * config.max_source_positions)
    return torch.randn(_ROWS, getattr(config, "max_length", 128), bins)


def _is_causal(model: Any) -> bool:
    """Whether its tokens see those before them alone, so that texts are padded on the left."""
    if model.config.is_encoder_decoder:
        return False
    if model.can_generate():
        return True
    # Encoders that could be decoders say in their config that they are none.
    could_be = "cache" in inspect.signature(model.forward).parameters
    return could_be and getattr(model.config, "is_decoder", None) is not False


def _fill_cache(model: Any, inputs: Mapping[str, Any]) -> Any:
    """A cache as the model fills it with earlier tokens."""
    import transformers

    config = model.config.get_text_config(decoder=True)
    given: dict[str, Any] = {"input_ids": _tokens(config, _PAST)}
    if "attention_mask" in inputs:
        given["attention_mask"] = inputs["attention_mask"][:, :_PAST]
    # Every layer keeps all it saw; a window is a matter of the mask.
    kinds = set(getattr(config, "layer_types", None) or [_FULL])
    cache = transformers.DynamicCache() if kinds <= _OF_KEYS else transformers.DynamicCache(config=config)
    with quiet():
        outputs = model(**given, cache=cache, use_cache=True)
    return getattr(outputs, "cache", cache)


def _axes_of_cache(cache: Mapping[str, Any]) -> dict[str, Mapping[int, str]]:
    axes: dict[str, Mapping[int, str]] = {}
    for path, value in leaves_of(cache).items():
        axes[path] = _KEYS if path.endswith((".keys", ".values")) and value.ndim == 4 else {0: BATCH}
    return axes


def _encoder_decoder(model: Any, *, has_cache: bool) -> list[Part]:
    """The encoder, the decoder on its first tokens, and the decoder behind a cache."""
    import transformers
    from transformers.modeling_outputs import BaseModelOutput

    encoder = model.get_encoder()
    takes = inspect.signature(encoder.forward).parameters
    inputs, axes = _own_inputs(model, takes, tokens=_SOURCE)
    inputs = {name: value for name, value in inputs.items() if name in takes}
    if _SEQUENCE in axes[model.main_input_name].values():
        axes = dict.fromkeys(inputs, _OF_SOURCE)
    parts = [Part("encoder_model", encoder, inputs, axes)]
    with quiet():
        hidden = encoder(**inputs).last_hidden_state
    ids = _tokens(model.config.get_text_config(decoder=True), _TOKENS)
    of_hidden = {axis: name for axis, name in axes[model.main_input_name].items() if name != OWN}
    given: dict[str, Any] = {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
    free: dict[str, Mapping[int, str]] = {
        "decoder_input_ids": {0: BATCH, 1: _SEQUENCE},
        "encoder_outputs.last_hidden_state": of_hidden,
    }
    if "attention_mask" in inputs:
        given["attention_mask"], free["attention_mask"] = inputs["attention_mask"], axes["attention_mask"]
    parts.append(Part("decoder_model", model, given, free, _OF_DECODERS))
    if has_cache:
        with quiet():
            earlier = given | {"decoder_input_ids": ids[:, :3]}
            empty = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
            cache = model(**earlier, cache=empty, use_cache=True).cache
        behind = free | _axes_of_cache({"cache": cache})
        of_cross = {0: BATCH, 2: of_hidden[1]} if 1 in of_hidden else {0: BATCH}
        behind |= {path: of_cross for path in behind if ".cross_attention_cache." in path}
        parts.append(Part("decoder_with_past_model", model, given | {"cache": cache}, behind, _OF_DECODERS))
    return parts
