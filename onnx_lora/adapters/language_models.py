"""Where classes of vision-language and speech models keep their language model: one body and one head, by other names
in other classes and versions. It knows names only.

From `_checkpoint_conversion_mapping` of the classes in transformers 4.57, and from the text-only classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LAYOUTS", "ModelLayout", "Reading", "readings"]

# What such models have beside their language model.
_OTHER_PARTS = frozenset(
    {
        "audio_projector",
        "audio_tower",
        "connector",
        "embed_audio",
        "embed_vision",
        "image_tower",
        "multi_modal_projector",
        "video_tower",
        "vision_model",
        "vision_tower",
        "visual",
        "vqmodel",
    }
)


@dataclass(frozen=True)
class ModelLayout:
    """The names of one class: `body` in front of the language model's layers, `head` for its output layer, and `others`
    in front of what the model has beside it."""

    body: str
    head: str
    others: str

    def part_of(self, name: str) -> tuple[str, str] | None:
        """The part that a module is of, and its name within; None: no module of this class is called so."""
        if name == self.head:
            return "head", ""
        if name.startswith(self.others):
            rest = name.removeprefix(self.others)
            if rest.partition(".")[0] in _OTHER_PARTS:
                return "others", rest
        if name.startswith(self.body):
            return "body", name.removeprefix(self.body)
        return None

    def name_of(self, part: tuple[str, str]) -> str:
        """Undoes `part_of`."""
        which, rest = part
        if which == "head":
            return self.head
        return (self.others if which == "others" else self.body) + rest


LAYOUTS = (
    # The text-only classes, and Qwen2-VL before transformers 4.52.
    ModelLayout("model.", "lm_head", ""),
    # Nearly all since 4.52, and nearly all before.
    ModelLayout("model.language_model.", "lm_head", "model."),
    ModelLayout("language_model.model.", "language_model.lm_head", ""),
    # A class without a head.
    ModelLayout("language_model.", "lm_head", ""),
    # Idefics, SmolVLM and Emu3, now and before.
    ModelLayout("model.text_model.", "lm_head", "model."),
    ModelLayout("text_model.model.", "text_model.lm_head", ""),
    # Qwen Omni's two language models.
    ModelLayout("thinker.model.", "thinker.lm_head", "thinker."),
    ModelLayout("talker.model.", "talker.codec_head", "talker."),
    # MiniCPM-V's own code.
    ModelLayout("llm.model.", "llm.lm_head", ""),
    # ColPali's and its kin, around a whole model, now and before.
    ModelLayout("vlm.model.language_model.", "vlm.lm_head", "vlm.model."),
    ModelLayout("vlm.language_model.model.", "vlm.language_model.lm_head", "vlm."),
)


@dataclass(frozen=True)
class Reading:
    """The names of all modules of an adapter as another class has them. `own` and `other`: how the names of the two
    classes begin."""

    names: Mapping[str, str]
    own: str
    other: str


def readings(names: Sequence[str], fits: Callable[[str], bool]) -> list[Reading]:
    """Every reading of `names` by which all of them are names that `fits` accepts; of equal ones the first."""
    found: list[Reading] = []
    for reading in _all_readings(names):
        is_new = all(reading.names != other.names for other in found)
        if is_new and all(map(fits, reading.names.values())):
            found.append(reading)
    return found


def _all_readings(names: Sequence[str]) -> Iterator[Reading]:
    for own in LAYOUTS:
        parts = [own.part_of(name) for name in names]
        known = [part for part in parts if part is not None]
        if not names or len(known) != len(names):
            continue
        for other in LAYOUTS:
            if other != own:
                meant = map(other.name_of, known)
                yield Reading(dict(zip(names, meant, strict=True)), own.body, other.body)
