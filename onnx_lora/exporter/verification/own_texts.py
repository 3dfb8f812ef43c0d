"""A package on the user's own texts, against the float model in PyTorch: how often both say the same, and how well each
predicts the texts. On a quantized base an adapter's delta is exact, and the answers are not the float model's: this
tells which of the two moved them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.boundary import public
from onnx_lora.errors import InputError, ModelError
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.exporter.frontends.quiet import quiet
from onnx_lora.exporter.frontends.sources import recorded_source
from onnx_lora.exporter.ort_check import open_graph, run_graph
from onnx_lora.exporter.verification.adapters import TriedAdapter, put_on_model
from onnx_lora.package import Package

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["TextComparison", "compare_texts"]

# One of these is in every folder with a tokenizer.
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")

# Tokens of all texts, and of one: attention takes the square of that.
_MOST_TOKENS, _LONGEST = 4096, 512


@dataclass(frozen=True, slots=True)
class TextComparison:
    """The package and the float model on the same texts, with one adapter or with none.

    `adapter`: its name; empty for the base. `answers`: how many were compared: next tokens, or labels of whole texts.
    `agreement`: the share of them for which both say the same. `loss_float`, `loss_package`: the mean cross-entropy of
    the texts' own next tokens, in nats; None for labels.
    """

    adapter: str
    answers: int
    agreement: float
    loss_float: float | None
    loss_package: float | None


@dataclass(frozen=True)
class _Answers:
    """What a model says of every text: the likeliest token or label of each place, and the loss of each next token."""

    best: Array
    losses: Array

    @staticmethod
    def of(model: Callable[[Array], Array], texts: Sequence[Array]) -> _Answers:
        best: list[Array] = []
        losses: list[Array] = []
        for ids in texts:
            logits = model(ids)
            if logits.ndim == 3:
                best.append(logits[0, :-1].argmax(axis=-1))
                losses.append(_cross_entropy(logits[0, :-1], ids[0, 1:]))
            else:
                best.append(logits.argmax(axis=-1))
        empty = np.zeros(0)
        return _Answers(np.concatenate(best), np.concatenate(losses) if losses else empty)


@public
def compare_texts(
    package: Package,
    checkpoint: str | os.PathLike[str],
    texts: Sequence[str],
    adapters: Sequence[TriedAdapter] = (),
) -> list[TextComparison]:
    """Compare a decoder's next tokens, or a classifier's labels, on texts: of the base, and of each adapter.

    Of long texts the first tokens count, and of many the first texts, 4,096 tokens in all. The package's graphs run as
    they are, quantized arithmetic included.

    Raises InputError: no text, a package of several graphs, or a graph that reads no tokens or gives no logits.
    ModelError: no such checkpoint or no tokenizer, or PEFT cannot load an adapter. MissingDependencyError.
    """
    if not isinstance(package, Package):
        raise InputError(f"package must be a Package, and is a {type(package).__name__}")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("texts must be a list of texts")
    original = recorded_source(package.manifest.source, checkpoint).load_original(package)
    encoded = _encode(checkpoint, texts)
    graph = _Graph.of(package, original.references())

    def in_float(ids: Array) -> Array:
        import torch

        with quiet(), torch.inference_mode():
            logits: Array = original.model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
        return logits

    def in_package(tensors: Mapping[str, Array]) -> _Answers:
        return _Answers.of(partial(graph.run, adapter=tensors), encoded)

    found = [_compare("", _Answers.of(in_float, encoded), in_package({}))]
    for adapter in adapters:
        with put_on_model(original.model, [adapter]):
            wanted = _Answers.of(in_float, encoded)
        found.append(_compare(adapter.name, wanted, in_package(package.graph().inputs(adapter.tensors))))
    return found


def _compare(adapter: str, wanted: _Answers, found: _Answers) -> TextComparison:
    agreement = float((wanted.best == found.best).mean())
    has_losses = wanted.losses.size > 0
    return TextComparison(
        adapter=adapter,
        answers=len(wanted.best),
        agreement=agreement,
        loss_float=float(wanted.losses.mean()) if has_losses else None,
        loss_package=float(found.losses.mean()) if has_losses else None,
    )


@dataclass(frozen=True)
class _Graph:
    """The package's graph, and what its inputs beside the tokens get: an empty cache, for one text."""

    package: Package
    name: str
    session: Any
    past: Mapping[str, Array]

    @staticmethod
    def of(package: Package, references: Sequence[Any]) -> _Graph:
        if len(package.manifest.graphs) != 1:
            raise InputError(
                "texts are compared on a package of one graph, a decoder or a classifier", path=package.path
            )
        info = package.graph()
        session = open_graph(package.path / info.file)
        names = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        if "input_ids" not in names or "logits" not in outputs:
            raise InputError(
                f"texts are compared on a graph from input_ids to logits, and this has {', '.join(outputs)}",
                path=package.path,
            )
        past: dict[str, Array] = {}
        for case in references:
            for name, value in case.feeds(names).items():
                if value.ndim == 4:
                    past[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), value.dtype)
        return _Graph(package, info.name, session, past)

    def run(self, ids: Array, adapter: Mapping[str, Array]) -> Array:
        """The logits of one text. `adapter`: by the graph's inputs."""
        names = [value.name for value in self.session.get_inputs()]
        optional = {value.name for value in self.session.get_overridable_initializers()}
        given: dict[str, Array] = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1], dtype=ids.dtype)[None],
            "token_type_ids": np.zeros_like(ids),
        }
        feeds = {name: value for name, value in given.items() if name in names} | dict(self.past)
        feeds |= {name: value for name, value in adapter.items() if name in optional}
        file = self.package.path / self.package.graph(self.name).file
        return run_graph(self.session, file, feeds)["logits"]


def _encode(checkpoint: str | os.PathLike[str], texts: Sequence[str]) -> list[Array]:
    """The texts' tokens, `[1, tokens]` each, as many as are compared."""
    folder = Path(checkpoint)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelError("must hold a tokenizer for texts to be compared, and holds none", path=checkpoint)
    with quiet(), library_failures(checkpoint, "read for its tokenizer"):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    encoded: list[Array] = []
    room = _MOST_TOKENS
    for text in texts:
        ids = np.array(tokenizer(text)["input_ids"], np.int64)[: min(_LONGEST, room)]
        if len(ids) > 1:
            encoded.append(ids[None])
            room -= len(ids)
    if not encoded:
        raise InputError("there must be a text of at least two tokens to compare on, and there is none")
    return encoded


def _cross_entropy(logits: Array, tokens: Array) -> Array:
    """The loss of each token `[n]` under its logits `[n, vocabulary]`, in nats."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(wide).sum(axis=-1))
    losses: Array = log_sum - wide[np.arange(len(tokens)), tokens]
    return losses
