"""The names of output layers, by what is asked of them: what "all-linear" leaves out, what PEFT saves whole, what is
tied to an embedding. It knows names alone; whether a model ties two weights, its package says."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CLASSIFIERS", "OFTEN_TIED", "OUTPUT_LAYERS", "TASK_HEADS", "TIED_OUTPUT_LAYERS", "VOCABULARY_HEADS"]

# peft/peft_model.py: the heads that PEFT adds to `modules_to_save`, by the task that a config names.
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# All of those: the heads of classification models, which PEFT always saves whole.
CLASSIFIERS: tuple[str, ...] = ("classifier", "qa_outputs", "score")

# Heads with an output for each entry of the vocabulary, none of which has a label.
VOCABULARY_HEADS: tuple[str, ...] = ("embed_out", "lm_head")

# Where no torch model says which module is the output layer: the names that transformers gives it. "all-linear" leaves
# it out, as PEFT does (`proj_out` is Whisper's).
OUTPUT_LAYERS: tuple[str, ...] = (*CLASSIFIERS, *VOCABULARY_HEADS, "proj_out")

# What transformers ties to its input embeddings (`_tied_weights_keys`), by the last part of a module's name.
TIED_OUTPUT_LAYERS: frozenset[str] = frozenset(
    [
        *VOCABULARY_HEADS,
        "decoder",
        "generator_lm_head",
        "lm_loss",
        "output_layer",
        "output_projection",
        "pred_layer",
        "proj_out",
        "vocab_projector",
    ]
)

# Modules whose weight is often one storage with another's: those output layers, and the tables that they are tied to.
OFTEN_TIED: frozenset[str] = TIED_OUTPUT_LAYERS | {"embed_in", "embed_tokens", "shared", "word_embeddings", "wte"}
