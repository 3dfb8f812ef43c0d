"""Quantized weights: how their numbers stand for floats, both ways. It knows arrays; it knows neither
graphs nor files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scheme", "dequantize", "is_rounded", "quantize"]

# Numbers of any type: mypy knows no arithmetic of `np.generic`.
Array = NDArray[Any]

# Half a step is what rounding to nearest moves a number. Above it: float32's own rounding, and that of scales kept in
# float16, which moves a number by so much of its distance from zero.
_NEAREST = 0.5 + 1e-3  # steps
_OF_FLOAT16 = 2.0**-10  # steps a step

_OTHER_SIZE = "scales or zero points of another size than the weight's"
_OTHER_SHAPE = "another shape than the scheme's"

# How far beyond the ends of its range a quantizer lets numbers lie for the sake of the others.
_CUT = 4.0  # steps


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a quantized weight `[rows, columns]` is kept: `w = (value - zero point) · scale`.

    layout      values                                    scale
    "blocks"    uint8 `[out, blocks, bytes]`, packed      `[out, blocks]`
    "affine"    int8, uint8, int4, uint4, as the weight   one, one per index along `axis`, or one per
                                                          `block_size` along it

    Zero points are as the scales, for "blocks" packed like the values or float; without them zero is 0, or
    the middle of the range for "blocks".
    """

    layout: Literal["blocks", "affine"]
    """`blocks`: as MatMulNBits of ONNX Runtime keeps weights, blocks along the columns, low bits first, the last block
    padded. `affine`: as DequantizeLinear of ONNX does."""

    bits: int
    """How many bits a number has."""

    block_size: int
    """How many numbers share a scale; 0 where `affine` has no blocks."""

    axis: int
    """Of `affine`: the axis along which scales differ; -1 where there is one scale."""

    rows: int
    """Of the weight as stored: outputs, of `blocks`."""

    columns: int
    """Of the weight as stored: inputs, of `blocks`."""

    def problem(
        self, values: tuple[int, ...], scale: tuple[int, ...], zero_point: tuple[str, tuple[int, ...]] | None
    ) -> str | None:
        """Why tensors of these shapes are none of this scheme's, or None. `zero_point`: its type and its shape."""
        if self.rows < 1 or self.columns < 1 or self.block_size < 0:
            return "impossible sizes"
        if self.layout == "blocks":
            return self._problem_of_blocks(values, scale, zero_point)
        return self._problem_of_affine(values, scale, zero_point)

    def _problem_of_blocks(
        self, values: tuple[int, ...], scale: tuple[int, ...], zero_point: tuple[str, tuple[int, ...]] | None
    ) -> str | None:
        if self.bits not in (2, 4, 8) or self.block_size < 1:
            return f"{self.bits} bits in blocks of {self.block_size}"
        scales = self.rows * self.blocks
        bytes_of_row = self.blocks * self.block_size * self.bits // 8
        if math.prod(values) != self.rows * bytes_of_row or math.prod(scale) != scales:
            return _OTHER_SIZE
        if zero_point is None:
            return None
        dtype, shape = zero_point
        expected = scales
        if dtype == "uint8":  # packed, each row in whole bytes
            expected = self.rows * _divide_up(self.blocks * self.bits, 8)
        return None if math.prod(shape) == expected else _OTHER_SIZE

    def _problem_of_affine(
        self, values: tuple[int, ...], scale: tuple[int, ...], zero_point: tuple[str, tuple[int, ...]] | None
    ) -> str | None:
        has_blocks_without_axis = self.axis < 0 and self.block_size > 0
        if has_blocks_without_axis or self.bits not in (4, 8) or self.axis not in (-1, 0, 1):
            return _OTHER_SHAPE
        if values != (self.rows, self.columns):
            return _OTHER_SHAPE
        if self.axis < 0:
            expected = 1
        elif self.block_size:
            along, other = values[self.axis], values[1 - self.axis]
            expected = _divide_up(along, self.block_size) * other
        else:
            expected = values[self.axis]
        if math.prod(scale) != expected:
            return _OTHER_SIZE
        if zero_point is not None and math.prod(zero_point[1]) != expected:
            return _OTHER_SIZE
        return None

    @property
    def blocks(self) -> int:
        """Blocks in a row, for the layout "blocks"."""
        return _divide_up(self.columns, self.block_size)


def _divide_up(length: int, size: int) -> int:
    """How many pieces of `size` hold `length`; the last piece may be padded."""
    return -(-length // size)


def dequantize(scheme: Scheme, values: Array, scale: Array, zero_point: Array | None) -> Array:
    """The weight in float32, `[rows, columns]`: `(values - zero_point) · scale`."""
    if scheme.layout == "blocks":
        return _from_blocks(scheme, values, scale, zero_point)
    weight: Array = values.astype(np.float32) - _spread_zeros(scheme, zero_point)
    return weight * _spread_scale(scheme, scale)


def is_rounded(scheme: Scheme, weight: Array, values: Array, scale: Array, zero_point: Array | None) -> bool:
    """Whether the `values` are what rounding `weight` `[rows, columns]` to nearest gives, number by number.

    True for every quantizer that rounds to nearest, whatever scales it chose; numbers beyond the ends of the range are
    cut off to them. False for those that spread an error over other numbers (GPTQ), and for another weight: one whose
    inputs or outputs were scaled above all.
    """
    steps = _spread_scale(scheme, scale)
    zeros: Any = _spread_zeros(scheme, zero_point)
    numbers: Any = _spread_numbers(scheme, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = weight / steps
    # A scale of zero holds zeros alone.
    of_no_scale = np.where(weight == 0, numbers - zeros, np.inf)
    exact = np.where(steps == 0, of_no_scale, exact) + zeros
    off = exact - numbers
    lowest, highest = _range(scheme, values)
    is_cut_below = (numbers <= lowest) & (off < 0)
    is_cut_above = (numbers >= highest) & (off > 0)
    allowed = _NEAREST + np.abs(numbers - zeros) * _OF_FLOAT16
    allowed = np.where(is_cut_below | is_cut_above, _CUT, allowed)
    return bool((np.abs(off) <= allowed).all())


def quantize(
    scheme: Scheme, weight: Array, values: Array, zero_point: Array | None
) -> tuple[Array, Array, Array | None]:
    """A weight `[rows, columns]` as values, float32 scale and zero point, in the scheme of the weight whose
    `values` and `zero_point` are given: with a zero point where that has one, over the range that it uses.
    """
    if scheme.layout == "blocks":
        return _to_blocks(scheme, weight, zero_point)
    return _to_affine(scheme, weight, values, zero_point)


def _from_blocks(scheme: Scheme, values: Array, scale: Array, zero_point: Array | None) -> Array:
    rows, blocks = scheme.rows, scheme.blocks
    numbers = _unpack(values.reshape(rows, blocks, -1), scheme.bits).astype(np.float32)
    numbers -= _block_zeros(scheme, zero_point)
    numbers *= scale.reshape(rows, blocks, 1).astype(np.float32)
    return numbers.reshape(rows, -1)[:, : scheme.columns]


def _block_zeros(scheme: Scheme, zero_point: Array | None) -> Any:
    """The zero points of the layout "blocks", `[rows, blocks, 1]`, or the one number that all have."""
    if zero_point is None:
        return np.float32(2.0 ** (scheme.bits - 1))
    if zero_point.dtype == np.uint8:
        unpacked = _unpack(zero_point.reshape(scheme.rows, -1), scheme.bits)
        return unpacked[:, : scheme.blocks, None].astype(np.float32)
    return zero_point.reshape(scheme.rows, scheme.blocks, 1).astype(np.float32)


def _to_blocks(scheme: Scheme, weight: Array, zero_point: Array | None) -> tuple[Array, Array, Array | None]:
    """ONNX Runtime's own rule (MLAS, `BlockedQuantization`): symmetric, the value furthest from zero becomes the
    lowest number; else the range from the least to the greatest value, which always holds zero."""
    blocks = _cut_into_blocks(weight, scheme.block_size)
    top = float(2**scheme.bits - 1)
    low = blocks.min(axis=2).clip(max=0.0)
    high = blocks.max(axis=2).clip(min=0.0)
    if zero_point is None:
        zeros = None
        middle: Any = 2.0 ** (scheme.bits - 1)
        furthest = np.where(np.abs(high) > np.abs(low), high, low)
        scale = furthest / -middle
    else:
        scale = (high - low) / top
        exact = -low / _without_zeros(scale)
        if zero_point.dtype == np.uint8:
            rounded = np.rint(exact).clip(0, top)
            packed = _pack(_pad_to_bytes(rounded, scheme.bits), scheme.bits)
            zeros = packed.reshape(zero_point.shape)
            middle = rounded[:, :, None]
        else:
            zeros = exact.astype(zero_point.dtype).reshape(zero_point.shape)
            middle = zeros.reshape(scheme.rows, scheme.blocks, 1).astype(np.float32)
    steps = _without_zeros(scale)[:, :, None]
    numbers = np.rint(blocks / steps + middle).clip(0, top)
    return _pack(numbers, scheme.bits), scale.astype(np.float32), zeros


def _cut_into_blocks(weight: Array, block_size: int) -> Array:
    """A weight `[rows, columns]` in float32 as `[rows, blocks, block_size]`, the last block padded with zeros."""
    rows, columns = weight.shape
    blocks = _divide_up(columns, block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, blocks, block_size)


def _without_zeros(scale: Array) -> Array:
    """Scales to divide by: of a block of zeros any does."""
    return np.where(scale == 0, 1, scale)


def _to_affine(
    scheme: Scheme, weight: Array, values: Array, zero_point: Array | None
) -> tuple[Array, Array, Array | None]:
    lowest, highest = _range(scheme, values)
    low, high = _ends(scheme, weight)
    is_symmetric = zero_point is None or (lowest < 0 and not zero_point.astype(np.int16).any())
    if not is_symmetric:
        scale = (high - low) / (highest - lowest)
        zeros: Any = np.rint(lowest - low / _without_zeros(scale)).clip(lowest, highest)
    elif lowest < 0:
        scale = np.maximum(-low, high) / min(highest, -lowest)
        zeros = np.zeros_like(scale)
    else:
        scale = high / highest
        zeros = np.zeros_like(scale)
    scale = _without_zeros(scale).astype(np.float32)
    exact = weight / _spread(scale, scheme) + _spread(zeros.astype(np.float32), scheme)
    numbers = np.rint(exact).clip(lowest, highest).astype(values.dtype)
    if zero_point is None:
        return numbers, scale, None
    return numbers, scale, zeros.astype(zero_point.dtype).reshape(zero_point.shape)


def _spread_numbers(scheme: Scheme, values: Array) -> Array:
    """The stored numbers as float32 `[rows, columns]`."""
    if scheme.layout == "affine":
        return values.astype(np.float32)
    numbers = _unpack(values.reshape(scheme.rows, scheme.blocks, -1), scheme.bits)
    return numbers.reshape(scheme.rows, -1)[:, : scheme.columns].astype(np.float32)


def _spread_scale(scheme: Scheme, scale: Array) -> Array:
    """Scales in float32, so that they meet the weight element by element."""
    if scheme.layout == "affine":
        return _spread(scale.astype(np.float32), scheme)
    blocks = scale.reshape(scheme.rows, scheme.blocks).astype(np.float32)
    return np.repeat(blocks, scheme.block_size, axis=1)[:, : scheme.columns]


def _spread_zeros(scheme: Scheme, zero_point: Array | None) -> Any:
    """Zero points in float32, so that they meet the weight element by element."""
    if scheme.layout == "affine":
        return np.float32(0) if zero_point is None else _spread(zero_point.astype(np.float32), scheme)
    zeros = np.broadcast_to(_block_zeros(scheme, zero_point), (scheme.rows, scheme.blocks, 1))[:, :, 0]
    return np.repeat(zeros, scheme.block_size, axis=1)[:, : scheme.columns]


def _range(scheme: Scheme, values: Array) -> tuple[int, int]:
    """The numbers a weight's own quantizer used: 7 of 8 bits where it reduced the range (old AVX2 machines)."""
    if scheme.layout == "blocks":
        return 0, 2**scheme.bits - 1
    numbers = values.astype(np.int16)
    if numbers.min(initial=0) >= 0 and values.dtype.name.startswith("u"):
        return 0, 2**scheme.bits - 1
    reach = 2 ** (scheme.bits - 1)
    half = reach // 2
    used = int(np.abs(numbers).max(initial=0))
    is_reduced = 0 < used <= half
    return (-half, half) if is_reduced else (-reach, reach - 1)


def _ends(scheme: Scheme, weight: Array) -> tuple[Array, Array]:
    """Least and greatest value for every scale, zero among them."""
    if scheme.axis < 0:
        low, high = weight.min(), weight.max()
    elif scheme.block_size:
        blocks = _cut_into_blocks(np.moveaxis(weight, scheme.axis, -1), scheme.block_size)
        low = np.moveaxis(blocks.min(axis=2), -1, scheme.axis)
        high = np.moveaxis(blocks.max(axis=2), -1, scheme.axis)
    else:
        other = 1 - scheme.axis
        low, high = weight.min(axis=other), weight.max(axis=other)
    return np.minimum(low, 0.0), np.maximum(high, 0.0)


def _spread(numbers: Array, scheme: Scheme) -> Array:
    """Scales or zero points so that they meet the weight element by element."""
    if scheme.axis < 0 or numbers.size == 1:
        return numbers.reshape(())
    if scheme.block_size:
        length = (scheme.rows, scheme.columns)[scheme.axis]
        repeated = np.repeat(numbers, scheme.block_size, axis=scheme.axis)
        return repeated[:length] if scheme.axis == 0 else repeated[:, :length]
    return numbers.reshape((-1, 1) if scheme.axis == 0 else (1, -1))


def _unpack(data: Array, bits: int) -> Array:
    """Bytes `[..., n]` as numbers `[..., n · 8 / bits]`, low bits first."""
    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers: Array = (data[..., None] >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(*data.shape[:-1], -1)


def _pack(numbers: Array, bits: int) -> Array:
    """Numbers `[..., n]` as bytes, low bits first; `n` must fill whole bytes."""
    small = numbers.astype(np.uint8)
    if bits == 8:
        return small
    per_byte = 8 // bits
    groups = small.reshape(*small.shape[:-1], -1, per_byte)
    packed: Array = np.bitwise_or.reduce(groups << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)
    return packed


def _pad_to_bytes(numbers: Array, bits: int) -> Array:
    """Padded with zeros so that the last axis fills whole bytes."""
    missing = -numbers.shape[-1] % (8 // bits)
    return np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, missing)])
