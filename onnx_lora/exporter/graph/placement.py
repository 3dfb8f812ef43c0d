"""How the rows of a batch lie in the value that a product reads: nouns alone, which `axes` and `find_sites` fill."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

__all__ = ["Form", "Placement"]


class Form(Enum):
    """How the rows of a batch lie in a value that a weight multiplies."""

    BATCHED = "axis 0 is the batch, and there are axes between it and the last"
    POOLED = "[batch, features]"
    FLATTENED = "[batch · positions, features], made by a Reshape"
    OTHER = "axis 0 is not known to be the batch"


@dataclass(frozen=True, slots=True)
class Placement:
    """How the batch lies in a site's input. Found before the first branch goes in: the shapes of values
    that branches add are not known.

    `rank`: how many axes the product has. Of a FLATTENED one, `flattened_by` is the Reshape, and `source_rank` the
    number of axes of its input; 0 where that has other features: heads, that the Reshape merges too.
    """

    form: Form
    rank: int
    flattened_by: ir.Node | None = None
    source_rank: int = 0

    @property
    def per_row(self) -> bool:
        """Whether a different adapter for every row of the batch is possible here."""
        return self.form is not Form.OTHER
