"""Numbers by module as a map: a row a layer, a column a module of it; as a picture, or in the terminal. It knows names
and numbers, and what neither means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from onnx_lora.errors import MissingDependencyError, printable

__all__ = ["PICTURES", "Heat"]

# What a picture's name may end with.
PICTURES = (".pdf", ".png", ".svg")

# Inches of a picture: a cell, a letter, and what is around all of them.
_CELL, _LETTER, _AROUND = (0.8, 0.3), 0.11, 2.0

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
        """By module names: up to their last number is the layer, behind it the module."""
        shown = {printable(name, _NAME_LIMIT, one_line=True): number for name, number in numbers.items()}
        cells = {_split(name): number for name, number in shown.items()}
        return Heat(
            printable(title, _NAME_LIMIT, one_line=True),
            tuple(dict.fromkeys(row for row, _ in cells)),
            tuple(dict.fromkeys(column for _, column in cells)),
            cells,
        )

    @property
    def highest(self) -> float:
        finite = [number for number in self.cells.values() if number < float("inf")]
        return max(finite, default=0.0)

    def table(self) -> Table:
        """For a terminal; of many kinds of modules a line for each module instead of a column for each kind."""
        table = Table(title=Text(self.title), title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        if len(self.columns) > _WIDE:
            table.add_column("", justify="right")
            for (row, column), number in self.cells.items():
                table.add_row(Text(".".join(filter(None, (row, column)))), self._cell(number))
            return table
        for column in self.columns:
            table.add_column(Text(_short(column)), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(Text(row or "-"), *(self._cell(self.cells.get((row, column))) for column in self.columns))
        return table

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
        shown = [[self.cells.get((row, column), float("nan")) for column in self.columns] for row in self.rows]
        left, below = (_LETTER * max(map(len, names)) for names in (self.rows, self.columns))
        width = max(len(self.columns) * _CELL[0] + left + _AROUND, _LETTER * len(self.title))
        figure = Figure(figsize=(width, len(self.rows) * _CELL[1] + below + _AROUND), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shown, aspect="auto", cmap=ListedColormap(_SHADES), vmin=0.0, vmax=self.highest or 1.0)
        figure.suptitle(self.title, fontsize=10, parse_math=False)
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(self.rows)), [row or "-" for row in self.rows], parse_math=False)
        for y, line in enumerate(shown):
            for x, number in enumerate(line):
                if number == number:
                    axes.text(x, y, f"{number:.3g}", ha="center", va="center", fontsize=8, color="#222222")
        figure.colorbar(image)
        figure.savefig(file, dpi=150)


def _short(column: str) -> str:
    """The last part of a name that is no number, and what stands behind it."""
    parts = column.split(".")
    begin = max((index for index, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[begin:])


def _split(name: str) -> tuple[str, str]:
    parts: Sequence[str] = name.split(".")
    # A number at the end is the module's own: `to_out.0`.
    last = max((index for index, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :]) or name
