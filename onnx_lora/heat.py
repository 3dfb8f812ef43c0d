"""Numbers by module as a map: a row a layer, a column a module of it; as a picture, or in the terminal. It knows names
and numbers, and not what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from onnx_lora.errors import MissingDependencyError, printable

__all__ = ["PICTURES", "Heat"]

# What a picture's name may end with.
PICTURES = (".pdf", ".png", ".svg")

# Sizes in a picture, in inches: one number of the map, one letter of a name, and the margins with the scale of colours.
_CELL_WIDTH = 0.8
_CELL_HEIGHT = 0.3
_LETTER = 0.11
_MARGINS = 2.0

_NAME_LIMIT = 200  # characters of one name

# More kinds of modules than this do not fit into a terminal side by side.
_WIDE = 12

# From cold to hot, on a dark and on a light ground alike.
_SHADES = ("#f7f7f7", "#fde0c5", "#facba6", "#f8b58b", "#f2855d", "#ef6a4c", "#eb4a40")


@dataclass(frozen=True)
class Heat:
    """Numbers in rows and columns; None where a layer has no such module."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], float]

    @staticmethod
    def of(title: str, numbers: Mapping[str, float]) -> Heat:
        """A map of the numbers of modules. A module's name up to its last number is the row (its layer), the rest of
        it the column."""
        cells: dict[tuple[str, str], float] = {}
        for name, number in numbers.items():
            cells[_split_name(_make_printable(name))] = number
        rows = dict.fromkeys(row for row, _ in cells)
        columns = dict.fromkeys(column for _, column in cells)
        return Heat(_make_printable(title), tuple(rows), tuple(columns), cells)

    @property
    def highest(self) -> float:
        """The highest number that is finite; 0 where there is none."""
        finite = [number for number in self.cells.values() if number < float("inf")]
        return max(finite, default=0.0)

    def table(self) -> Table:
        """For a terminal: a line for each layer; where there are many kinds of modules, a line for each module."""
        table = Table(title=Text(self.title), title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        if len(self.columns) > _WIDE:
            self._add_modules(table)
        else:
            self._add_layers(table)
        return table

    def _add_modules(self, table: Table) -> None:
        table.add_column("", justify="right")
        for (row, column), number in self.cells.items():
            name = f"{row}.{column}" if row else column
            table.add_row(Text(name), self._cell(number))

    def _add_layers(self, table: Table) -> None:
        for column in self.columns:
            table.add_column(Text(_shorten_name(column)), justify="right", no_wrap=True)
        for row in self.rows:
            cells = [self._cell(self.cells.get((row, column))) for column in self.columns]
            table.add_row(Text(row or "-"), *cells)

    def _cell(self, number: float | None) -> Text:
        if number is None:
            return Text("")
        share = min(1.0, number / self.highest) if self.highest else 0.0
        shade = _SHADES[round(share * (len(_SHADES) - 1))]
        return Text(f" {number:.3g} ", style=f"#222222 on {shade}")

    def draw(self, file: Path) -> None:
        """Write a picture; `file` ends with one of `PICTURES`. Raises MissingDependencyError: no matplotlib."""
        try:
            from matplotlib.colors import ListedColormap
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError(
                "drawing a picture needs matplotlib: pip install 'onnx-lora[plot]'", path=file
            ) from error
        heights = [len(column) * _LETTER for column in self.columns]
        widths = [len(row) * _LETTER for row in self.rows]
        width = len(self.columns) * _CELL_WIDTH + max(widths) + _MARGINS
        height = len(self.rows) * _CELL_HEIGHT + max(heights) + _MARGINS
        figure = Figure(figsize=(max(width, _LETTER * len(self.title)), height), layout="constrained")
        figure.suptitle(self.title, fontsize=10, parse_math=False)
        axes = figure.subplots()
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(self.rows)), [row or "-" for row in self.rows], parse_math=False)
        numbers = self._grid()
        colours = ListedColormap(_SHADES)
        image = axes.imshow(numbers, aspect="auto", cmap=colours, vmin=0.0, vmax=self.highest or 1.0)
        for y, line in enumerate(numbers):
            for x, number in enumerate(line):
                if not math.isnan(number):
                    axes.text(x, y, f"{number:.3g}", ha="center", va="center", fontsize=8, color="#222222")
        figure.colorbar(image)
        figure.savefig(file, dpi=150)

    def _grid(self) -> list[list[float]]:
        """The numbers in lines of columns; NaN where a layer has no such module."""
        grid: list[list[float]] = []
        for row in self.rows:
            grid.append([self.cells.get((row, column), math.nan) for column in self.columns])
        return grid


def _make_printable(name: str) -> str:
    return printable(name, _NAME_LIMIT, one_line=True)


def _shorten_name(column: str) -> str:
    """The last part of a name that is no number, and the numbers behind it: `to_out.0` of `attn.to_out.0`."""
    parts = column.split(".")
    begin = 0
    for index, part in enumerate(parts):
        if not part.isdigit():
            begin = index
    return ".".join(parts[begin:])


def _split_name(name: str) -> tuple[str, str]:
    """A module's layer and its name in the layer: `model.layers.0` and `self_attn.q_proj`."""
    parts = name.split(".")
    end = 0
    # The last part is the module's own, even if it is a number: `to_out.0`.
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            end = index + 1
    return ".".join(parts[:end]), ".".join(parts[end:]) or name
