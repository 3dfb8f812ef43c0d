"""The one tolerance table of the suite, and the comparison that uses it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOLERANCE", "assert_close", "assert_same_bits"]

# Largest |actual - expected| allowed, relative to the largest |expected| (at least 1). Two float32
# programs that add the same products in another order differ by a few units of 2**-24 times
# the depth of the network; PEFT against itself (merged against unmerged) differs as much.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-2}


def assert_close(actual: NDArray[np.generic], expected: NDArray[np.generic], *, dtype: str = "float32") -> None:
    """Both arrays agree within the table's tolerance; says the largest difference and where."""
    assert actual.shape == expected.shape, f"shape {actual.shape} is not {expected.shape}"
    if actual.size == 0:
        return
    wide, reference = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(reference)
    assert np.array_equal(np.isfinite(wide), finite), "infinities and NaN lie elsewhere"
    assert np.array_equal(wide[~finite], reference[~finite], equal_nan=True), "an infinity has another sign, or is NaN"
    difference = np.zeros_like(reference)
    difference[finite] = np.abs(wide[finite] - reference[finite])
    where = np.unravel_index(int(difference.argmax()), difference.shape)
    scale = max(1.0, float(np.abs(reference[finite]).max(initial=0.0)))
    allowed = TOLERANCE[dtype] * scale
    assert difference[where] <= allowed, (
        f"differs by {difference[where]:.3g} at {tuple(map(int, where))} (allowed {allowed:.3g}): "
        f"{wide[where]:.8g}, expected {reference[where]:.8g}"
    )


def assert_same_bits(actual: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    """Both arrays are the same, bit for bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    different = np.argwhere(actual.view(np.uint8).reshape(-1) != expected.view(np.uint8).reshape(-1))
    assert not len(different), (
        f"{len(different)} bytes of {actual.nbytes} differ; largest difference {np.abs(actual - expected).max():.3g}"
    )
