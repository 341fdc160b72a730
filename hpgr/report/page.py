"""A self-contained HTML page of sections of blocks (text, table, figure, code), and the text of a terminal summary.

What the reports share: blocks, cells of a table, lines of a summary. The template escapes every text.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import numpy as np

Json = Mapping[str, Any]
NONE = "-"
CLICK_METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "Log loss", "calibration": "Calibration"}
CLICK_METRICS |= {"ndcg": "NDCG", "mrr": "MRR"}
LINES, COLUMNS = 24, 100
"""Size of a terminal summary."""


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Drawing:
    kind: ClassVar[str] = "figure"
    title: str
    src: str
    caption: str


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    mark: int = -1


@dataclass(frozen=True)
class Beside:
    kind: ClassVar[str] = "beside"
    parts: Sequence[Table]


Block = Text | Code | Drawing | Table | Beside


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    hint: str


def render_page(name: str, where: str, cards: Sequence[Card], sections: Sequence[Section], kind: str = "run") -> str:
    """One HTML page with inline style and plots, equal for equal arguments; loads nothing from elsewhere.

    Args:
        name, where: the headline and the line below it.
        kind: what is reported (run, search), for the title of the window.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = {"name": name, "where": where, "cards": cards, "sections": sections, "kind": kind}
    return environment.get_template("page.html.j2").render(page=page)


def part(tree: Json, *path: str) -> Json:
    """The mapping at a path, {} where there is none."""
    node: Any = tree
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def real(value: Any) -> float | None:
    """A finite number or None; metrics.json may hold null."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def show(value: Any, digits: int = 4) -> str:
    """A cell: 12,345 or 0.1234, text as it is, - for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.{digits}f}" if isinstance(value, float | np.floating) else str(value)


def share(numerator: Any, whole: Any) -> str:
    top, bottom = real(numerator), real(whole)
    return NONE if top is None or not bottom else f"{top / bottom:.2%}"


def duration(value: Any) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    seconds = real(value)
    if seconds is None or seconds < 0:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float) -> str:
    """A setting's number: 0.0003, 3e-5, 4096, 2.5; no more than four digits count below 10,000."""
    return f"{value:.4g}".replace("e-0", "e-") if abs(value) < 1e4 else f"{value:.0f}"


def setting(value: Any) -> str:
    """A setting's value as it is written in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return number(value) if isinstance(value, float) else str(value)


def clip(text: str, width: int) -> str:
    """The text on one line of at most `width` characters; a longer one loses its middle."""
    line = " ".join(text.split())
    tail = (width - 1) // 2
    return line if len(line) <= width else f"{line[: width - 1 - tail]}…{line[len(line) - tail :]}"


def figures(metrics: Json, keys: Sequence[str]) -> str:
    """The figures of a summary line: `AUC 0.7321, Log loss 0.4500`."""
    return ", ".join(f"{CLICK_METRICS.get(k, k)} {show(metrics[k])}" for k in keys if k in metrics)


def entry(name: str, text: str, most: int = 3) -> list[str]:
    """`name` in a column of 12, the text wrapped beside it, `most` lines at most."""
    wrapped = textwrap.wrap(
        text, COLUMNS - 12, max_lines=most, placeholder=" …", break_long_words=False, break_on_hyphens=False
    )
    return [f"{name if i == 0 else '':<12}{line}" for i, line in enumerate(wrapped)]


def command(text: str) -> list[str]:
    """The command, broken after words with a backslash where it is long, so that it can still be pasted."""
    wrapped = textwrap.wrap(text, COLUMNS - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [f"  {line} \\" for line in wrapped[:-1]] + [f"  {line}" for line in wrapped[-1:]]


def screen(lines: Sequence[str], next_commands: Sequence[str]) -> str:
    """A summary's lines, and below them as many lines of the commands one may type next as the screen has room for."""
    commands = [line for text in next_commands for line in command(text)]
    room = LINES - len(lines) - 1
    return "\n".join([*lines, *(["next:", *commands[:room]] if commands else [])])
