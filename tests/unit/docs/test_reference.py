"""The reference page is what the code says, and every key has a sentence."""

import re
from pathlib import Path

from hpgr.search.reference import page

ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_page_is_the_generated_one() -> None:
    """After a change of settings: `python -m hpgr.search.reference > docs/reference.md`."""
    assert (ROOT / "docs/reference.md").read_text(encoding="utf-8") == page()


def test_every_key_has_a_sentence() -> None:
    rows = re.findall(r"^\| `(\S+)` \|.*\| (.*?) \|$", page(), re.MULTILINE)
    assert len(rows) > 100
    assert [key for key, sentence in rows if len(sentence) < 5] == []
