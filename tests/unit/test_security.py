"""No code from configurations, data or artefacts; no key of a store in anything that is written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpgr.artifacts import Folder, resolve
from hpgr.config import load_config
from hpgr.errors import ArtifactError, ConfigError
from hpgr.search.matrix import load_matrix
from hpgr.search.space import load_space

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for d in ("hpgr", "jobs", "cluster") for p in (ROOT / d).rglob("*.py"))
RUN_CODE = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system",
            "os.popen", "torch.load", "torch.save", "np.load", "pd.read_pickle", "joblib.load"}  # fmt: skip
UNPICKLERS = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
RESULTS_OF_OWN_TASKS = ROOT / "hpgr/on_ray/parallel.py"
"""Pickles what its own tasks return, in Ray's object store, as Ray itself does; it reads no file."""


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)
            if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield node.lineno, "shell=True"


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_the_search_finds_what_it_looks_for() -> None:
    tree = ast.parse("import pickle.x\nfrom dill import y\nyaml.load(z)\nrun(a, shell=True)")
    assert set(imports(tree)) == {"pickle", "dill"}
    assert [name for _, name in calls(tree)] == ["yaml.load", "run", "shell=True"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_runs_code_or_unpickles(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = {"yaml.load"} if path == ROOT / "hpgr/config/plain.py" else set()  # with a SafeLoader
    found = [call for call in calls(tree) if call[1] in (RUN_CODE | {"shell=True"}) - allowed]
    assert found == []
    if path != RESULTS_OF_OWN_TASKS:
        assert UNPICKLERS & set(imports(tree)) == set()


LAUGHS = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]",
                    *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])  # fmt: skip
BROKEN = {
    "tag": b"name: !!python/object/apply:os.system ['touch owned']",
    "tag of a class": b"data: !!python/object:pathlib.Path {}",
    "bomb of anchors": LAUGHS.encode(),
    "anchor of itself": b"data: &a\n  split: *a",
    "unknown key": b"data: {colums: {user: u}}",
    "wrong type": b"stage1: {epochs: many}",
    "list for a section": b"data: [1, 2]",
    "list at the top": b"- data",
    "text at the top": b"data",
    "number at the top": b"7",
    "a key twice": b"seed: 1\nseed: 2",
    "a key twice inside": b"data: {path: a, path: b}",
    "no UTF-8": b"name: \xff\xfe\xe9",
    "UTF-16": "name: x".encode("utf-16"),
    "NUL": b"name: a\x00b",
    "cut short": b"data: {columns: {user: 'u",
    "tab": b"data:\n\tpath: x",
    "two documents": b"name: a\n---\nname: b",
    "a key that is no text": b"1: 2\n? [a, b]\n: c",
    "not a number": b"stage1: {learning_rate: .nan}",
    "infinite": b"stage1: {learning_rate: .inf}",
    "huge": b"seed: 1" + b"0" * 5000,
    "deep": b"data: " + b"[" * 600 + b"]" * 600,
    "date": b"name: 2020-13-45",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_in_words(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "broken.yaml"
    path.write_bytes(BROKEN[what])
    for load in (load_config, load_space, load_matrix):
        with pytest.raises(ConfigError) as caught:
            load(str(path))
        assert len(str(caught.value)) < 4000
    assert [p.name for p in tmp_path.iterdir()] == ["broken.yaml"]


@pytest.mark.parametrize("text", ["seed=!!python/object/apply:os.getcwd []", "data.path=[1", "data.path=\x00", "a..b=1",
                                  "seed=" + "[" * 600])  # fmt: skip
def test_a_broken_override_is_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, [text])


@pytest.mark.parametrize("uri", ["s3://KEY:PLANTED@bucket/x", "s3://bucket/x?access_key=KEY&secret_key=PLANTED"])
def test_a_key_in_an_address_is_refused_and_not_repeated(uri: str) -> None:
    for use in (lambda: resolve(uri), lambda: Folder(uri).exists()):
        with pytest.raises(ArtifactError) as caught:
            use()
        assert "PLANTED" not in str(caught.value)
