"""The reference page of all keys, made from the code: `python -m hpgr.search.reference > docs/reference.md`."""

from __future__ import annotations

import sys

from hpgr.config import Config
from hpgr.config.reference import tables
from hpgr.search.matrix import Matrix
from hpgr.search.space import Space

START = """# Reference of all keys

Made from the code by `python -m hpgr.search.reference > docs/reference.md`; a test holds the two equal. Keys are paths:
`data.columns.user` is `user` in `columns` in `data`, and `--set data.columns.user=uid` overrides it. Unknown keys are
errors. `[]` stands for each entry of a list, `NAME` for a name of your own.
"""
PARTS = (
    (Config, "Configuration", "Files of `--config`; every key may be left out."),
    (Space, "Search spaces", "Files of `tune.py --space`; see [search](search.md). Overrides begin with `space.`"),
    (Matrix, "Comparisons", "Files of `compare.py`; see [comparison](comparison.md). Overrides begin with `compare.`"),
)  # fmt: skip


def page() -> str:
    """The whole page."""
    parts = [
        f"## {title}\n\n{about}\n\n" + "\n\n".join(tables(root, f"{title}: top level")) for root, title, about in PARTS
    ]
    return "\n".join([START, *(part + "\n" for part in parts)])


if __name__ == "__main__":
    sys.stdout.write(page())
