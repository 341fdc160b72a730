"""Quotes of a CSV file that are never closed, or close where another value begins: rows in between would be lost."""

from __future__ import annotations

import numpy as np

from hpgr.schema import Array, Ints

QUOTE, NEWLINE = b'"', b"\n"
_AROUND = np.zeros(256, bool)
"""Bytes that quoted values stand between."""
_AROUND[list(b",\r\n")] = True
_MAY_STAND = _AROUND.copy()
"""Beside a quote: those, or another quote, for inside of a quoted value it is written twice."""
_MAY_STAND[QUOTE[0]] = True


class Quotes:
    """Follows the quotes of a file as Arrow's parser does, piece by piece: one opens a value where it is the first byte
    of it, closes it unless another follows, and is a byte like any other elsewhere."""

    def __init__(self) -> None:
        self._rest, self._before, self._line = b"", NEWLINE[0], 1
        self._open = 0
        """Line of the quote that is open; 0 if none is."""
        self._mistaken = ""

    def see(self, data: bytes) -> None:
        """The next bytes of the file; none at its end."""
        every = self._rest + data
        known = every.rstrip(QUOTE) if data else every  # what follows a quote tells what it does
        self._rest = every[len(known) :]
        if QUOTE in known and not self._mistaken:
            self._follow(np.frombuffer(known, np.uint8))
        if known:
            self._before, self._line = known[-1], self._line + known.count(NEWLINE)

    def fault(self) -> str:
        """What is wrong with the quotes so far; "" if nothing."""
        fault = self._mistaken
        if self._open and not fault:
            fault = f"the quote that opens a value in line {self._open:,} is never closed"
        return f"{fault}: rows would be lost in it; remove that quote, or double it inside of quotes" if fault else ""

    def _follow(self, data: Array) -> None:
        at = np.flatnonzero(data == QUOTE[0])
        first = int(bool(self._open))  # the first quote that opens a value, if each is well placed
        if _MAY_STAND[self._before_of(at[first::2], data)].all() and _MAY_STAND[_after(at[1 - first :: 2], data)].all():
            opened = (len(at) + first) % 2
            self._open = self._line + int(np.count_nonzero(data[: at[-1]] == NEWLINE[0])) if opened else 0
        else:
            lines = self._line + np.searchsorted(np.flatnonzero(data == NEWLINE[0]), at)
            begins = _AROUND[self._before_of(at, data)]
            self._step(begins.tolist(), _after(at, data).tolist(), lines.tolist())

    def _before_of(self, at: Ints, data: Array) -> Array:
        """The byte before each place of a piece."""
        out = data[at - 1]
        if len(at) and not at[0]:
            out[0] = self._before
        return out

    def _step(self, begins: list[bool], after: list[int], lines: list[int]) -> None:
        doubled = False
        for begin, following, line in zip(begins, after, lines, strict=True):
            if doubled:
                doubled = False
            elif not self._open:
                self._open = line if begin else 0
            elif following == QUOTE[0]:
                doubled = True
            else:
                if line > self._open and not _AROUND[following]:
                    self._mistaken = (f"the quote that opens a value in line {self._open:,} is closed in line "
                                      f"{line:,}, in the middle of a value")  # fmt: skip
                    return
                self._open = 0


def _after(at: Ints, data: Array) -> Array:
    """The byte after each place of a piece; none may follow its last one but at the end of the file."""
    if not len(at) or at[-1] + 1 < len(data):
        return data[at + 1]
    return np.append(data[at[:-1] + 1], NEWLINE[0])
