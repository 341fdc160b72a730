"""What the pages say exists: links and anchors, keys, files, jobs and their options, configurations in YAML."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from hpgr.config import Config, override, validate
from hpgr.config.reading import inner_section
from hpgr.search.matrix import Matrix, load_matrix, parse_matrix
from hpgr.search.space import Space

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROOTS = (("", Config), ("space.", Space), ("compare.", Matrix))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, punctuation gone, spaces to hyphens."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command that runs a file of this repository, continuation lines joined."""
    for _, block in (m.groups() for m in FENCE.finditer(text) if m[1] in ("bash", "")):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|(?<= )-- (?=\S*python )", line):
                if re.search(r"python (jobs|cluster)/\w+\.py", part):
                    yield shlex.split(part, comments=True)


def exists(path: str) -> bool:
    """Whether a dotted path is a key of the configuration, or of a space or matrix behind its prefix."""
    for prefix, root in ROOTS:
        section, parts = root, path.removeprefix(prefix).split(".")
        if not path.startswith(prefix):
            continue
        for i, part in enumerate(parts):
            field = section.model_fields.get(part)
            if field is None:
                break
            if i == len(parts) - 1:
                return True
            inner = inner_section(field.annotation)
            if inner is None:
                break
            section = inner
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_keys_exist(page: Path) -> None:
    """Dotted keys in backticks that begin with a section's name, and those that --set names."""
    text = text_of(page)
    keys = set(re.findall(r"--set ([a-z][\w.]*\.\w+)=", text))
    sections = "|".join(name for name, field in Config.model_fields.items() if inner_section(field.annotation))
    if page.stem != "reference":
        keys |= set(re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)`", text))
    keys = {key for key in keys if not re.search(r"\.(py|yaml|json|md)$|^\w+\.[a-z]\.", key) and "a.b" not in key}
    assert sorted(key for key in keys if not exists(key)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_configurations_are_valid(page: Path) -> None:
    """YAML blocks, and those a shell block writes into a .yaml file."""
    blocks = [m[2] for m in FENCE.finditer(text_of(page)) if m[1] == "yaml"]
    blocks += re.findall(r"> \w+\.yaml <<'EOF'\n(.*?)^EOF", text_of(page), re.MULTILINE | re.DOTALL)
    for block in map(yaml.safe_load, blocks):
        parse_matrix(block) if "rows" in block else validate(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_files_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w/])((?:jobs|cluster|hpgr|tune_spaces|tests|docs)/[\w./-]*\w)", text_of(page))
    assert sorted({name for name in named if not (ROOT / name).exists() and "NAME" not in name}) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_are_ones_the_jobs_know(page: Path) -> None:
    """Options by the job's source and what all jobs share; overrides by the tree itself."""
    shared = text_of(ROOT / "hpgr/on_ray/command.py")
    for words in commands(text_of(page)):
        job = next(w for w in words if w.endswith(".py"))
        known = set(re.findall(r'"(--[a-z-]+)"', text_of(ROOT / job)))
        known |= set(re.findall(r'"(--[a-z-]+)"', shared)) if "command.parser" in text_of(ROOT / job) else set()
        rest = words[words.index(job) + 1 :]
        assert {w for w in rest if w.startswith("--") and w != "--"} <= known, words
        for i, word in enumerate(rest):
            if word == "--set" and not rest[i + 1].startswith(("space.", "compare.")):
                assert override({}, rest[i + 1]) is None


def test_batch_score_commands_parse() -> None:
    """By the job's own parser, mutual exclusions and required options among them."""
    spec = importlib.util.spec_from_file_location("batch_score_job", ROOT / "jobs/batch_score.py")
    assert spec
    assert spec.loader
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    found = [w for page in PAGES for w in commands(text_of(page)) if "jobs/batch_score.py" in w]
    assert len(found) >= 4
    for words in found:
        job.parser().parse_args(words[words.index("jobs/batch_score.py") + 1 :])


def test_rows_of_results_are_rows_of_their_matrix() -> None:
    told = re.findall(r"`(compare-[\w-]+\.yaml)([^`]*--rows [^`]+)`", text_of(ROOT / "docs/results.md"))
    assert len(told) >= 5
    for name, words in told:
        rows = takewhile(lambda word: not word.startswith("--"), shlex.split(words.partition("--rows ")[2]))
        known = load_matrix(ROOT / "jobs/configs" / name)
        known.only([" ".join(row.split()) for row in rows if row != "..."])


def test_a_wrong_key_is_found() -> None:
    assert exists("resources.workers")
    assert exists("space.budget.trials")
    assert not exists("resources.wrokers")
    assert not exists("resources.workers.many")
