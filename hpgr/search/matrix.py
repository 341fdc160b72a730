"""What a comparison runs: named rows of settings x seeds, a tuning budget equal for all, curves of sensitivity; checked
before anything starts."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from hpgr.artifacts import Folder, absolute, fingerprint
from hpgr.config import Config, Count, Natural, Section, dump, faults_of, load_config, override, plain_mapping, validate
from hpgr.errors import ArtifactError, ConfigError
from hpgr.search.space import FIXED, Scalar, leaves_of, placed, value_at

Values = dict[str, Scalar]
"""Settings by dotted configuration path."""
Name = Annotated[str, Field(min_length=1, max_length=40)]
AFFECT_NOTHING = ("name", "resources", "checkpoints", "tracking")
"""Sections that change no result, so cells that differ in them alone are one."""
SHOW_ATTENTION = ("hpgr", "hstu")
"""Models whose shares of attention can be read."""


class Tuning(Section):
    """Settings that every row tries, one seed each, before it is compared: validation AUC chooses."""

    parameters: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = Field(default_factory=dict)
    """Values to try by path. Nothing: rows are compared as they stand."""
    rows: dict[Name, dict[str, Annotated[list[Scalar], Field(min_length=1)]]] = Field(default_factory=dict)
    """Values that a row tries in place of `parameters`, of a model that has none of those or another scale."""
    draws: Count = 4
    """Settings that a row tries, its own always among them; the others are drawn from the grid of all values, the same
    ones for all rows but those of `rows`."""
    seed: Natural = 0
    """Of the draw."""

    def only(self, names: Sequence[str]) -> Tuning:
        """The same for these rows alone."""
        return self.model_copy(update={"rows": {name: own for name, own in self.rows.items() if name in names}})


class Curves(Section):
    """Validation AUC of a row over each of some settings, all others as the row has them."""

    row: Name
    """Row whose settings are varied."""
    over: Annotated[dict[str, Annotated[list[Scalar], Field(min_length=1)]], Field(min_length=1)]
    """Values by path; the row's own value is always a point."""


class Bootstrap(Section):
    draws: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the users."""
    seed: Natural = 0
    """Of the resamples."""


class Noise(Section):
    """How much attention goes to events that do not matter: two rows, one dense and one that attends to anchors alone.

    On the generated log, where it is known what matters, for each share of noise planted there; on any log, how many of
    the anchors are among the events that the dense row attends to most.
    """

    sparse: Name
    """Row that attends by PGSA."""
    dense: Name
    """Row that attends to everything."""
    planted: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=list)
    """Values of data.synthetic.noise, each a log of its own."""


class Learnt(Section):
    """Pictures of what a row has learnt: a map of its item vectors after stage 1, neighbours of some items, and the
    attention of one user's impressions."""

    row: Name
    """Row that is pictured."""
    items: str | None = None
    """Parquet file that tells about items; null: what the generated log knows, else nothing."""
    id: str = "item_id"
    """Its columns: the item's id in the log,"""
    title: str | None = None
    """its name, null: the id,"""
    group: str | None = None
    """and its kind, which colours the map; of `a|b|c` the first."""
    neighbours: Annotated[int, Field(ge=1, le=20)] = 5
    """Nearest items shown of each."""
    projection: Literal["auto", "umap", "pca"] = "auto"
    """How the map is laid out. auto: umap where its package is installed (extra `maps`), else pca; the report says
    which."""


class Matrix(Section):
    name: Name = "compare"
    """Begins the name of a folder that was given none."""
    base: str | dict[str, Any] = Field(default_factory=dict)
    """Configuration that all rows start from: a file beside this one, or the keys themselves."""
    seeds: Annotated[list[Natural], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2])
    """Every row is trained once with each."""
    rows: Annotated[dict[Name, Values], Field(min_length=1)]
    """Models and ablations: what each changes of `base`."""
    baseline: Name | list[Name] = Field(default_factory=list)
    """Rows that every other one is compared with; nothing: the first row."""
    tables: list[list[str]] = Field(default_factory=list)
    """Scorers without a model that every row is compared with, too: tables of training-time click rates by these
    categorical features of impressions, and by whether the user engaged with the item before."""
    tuning: Tuning = Tuning()
    sensitivity: Curves | None = None
    """Curves over settings of one row; null: none."""
    bootstrap: Bootstrap = Bootstrap()
    noise: Noise | None = None
    """Attention on events that do not matter; null: not measured."""
    learnt: Learnt | None = None
    """Pictures of what was learnt; null: none."""
    concurrency: Count | None = None
    """Most cells at once; null: as many as the cluster, fully scaled up, has room for."""

    @property
    def baselines(self) -> list[str]:
        given = [self.baseline] if isinstance(self.baseline, str) else self.baseline
        return given or [next(iter(self.rows))]

    @model_validator(mode="after")
    def _refers_to_rows(self) -> Matrix:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}, expected different ones")
        named = [("baseline", name) for name in self.baselines]
        for key in ("sensitivity", "learnt"):
            named += [(f"{key}.row", getattr(self, key).row)] if getattr(self, key) else []
        named += [("tuning.rows", name) for name in self.tuning.rows]
        if self.noise:
            named += [("noise.sparse", self.noise.sparse), ("noise.dense", self.noise.dense)]
        faults = [f"{key}: there is no row {name!r}; {self.near(name)}" for key, name in named if name not in self.rows]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def near(self, name: str) -> str:
        """What a name that is no row's may have meant."""
        near = difflib.get_close_matches(name, self.rows, n=1)
        return f"did you mean {near[0]}?" if near else f"rows: {', '.join(self.rows)}"


@dataclass(frozen=True)
class Cell:
    """One training: a row of the matrix with settings of its own and a seed. `key` tells what it computes."""

    row: str
    values: Values
    """What is changed beside the row's own settings: by tuning, or by a curve."""
    config: Config

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def key(self) -> str:
        return fingerprint({k: v for k, v in dump(self.config).items() if k not in AFFECT_NOTHING})

    @property
    def label(self) -> str:
        changed = " ".join(f"{path.rpartition('.')[2]}={value}" for path, value in self.values.items())
        return " ".join(filter(None, [self.row, changed, f"seed {self.seed}"]))


@dataclass(frozen=True)
class Plan:
    """A matrix beside the configuration that its rows start from."""

    matrix: Matrix
    base: Config

    def only(self, names: Sequence[str]) -> Plan:
        """These rows alone, the baselines among them, and the studies that need no other.

        Raises:
            ConfigError: there is no such row.
        """
        matrix = self.matrix
        missing = [name for name in names if name not in matrix.rows]
        if missing:
            raise ConfigError(f"--rows: there is no row {missing[0]!r}; {matrix.near(missing[0])}")
        curves, learnt, noise = matrix.sensitivity, matrix.learnt, matrix.noise
        kept = {
            "rows": {name: matrix.rows[name] for name in names},
            "tuning": matrix.tuning.only(names),
            "baseline": [name for name in matrix.baselines if name in names],
            "sensitivity": curves if curves and curves.row in names else None,
            "learnt": learnt if learnt and learnt.row in names else None,
            "noise": noise if noise and {noise.sparse, noise.dense} <= set(names) else None,
        }
        return Plan(matrix.model_copy(update=kept), self.base)

    def cell(self, row: str, seed: int, values: Values | None = None, data: dict[str, Any] | None = None) -> Cell:
        """A cell of a row; `data` places other values before the row's own, such as another generated log."""
        values = values or {}
        settings = {**(data or {}), **self.matrix.rows[row], **values, "seed": seed}
        return Cell(row, values, validate(placed(dump(self.base), settings)))

    def tuned(self, row: str) -> list[Cell]:
        """What a row tries, its own settings first; all with the first seed. What makes the row stays as it is, less
        what `tuning.rows` varies."""
        cells: dict[str, Cell] = {}
        fixed = self.matrix.rows[row].keys() - self.matrix.tuning.rows.get(row, {}).keys()
        for values in [{}, *self._draws(row)]:
            drawn = {path: value for path, value in values.items() if path not in fixed}
            cell = self.cell(row, self.matrix.seeds[0], drawn)
            cells.setdefault(cell.key, cell)
        return list(cells.values())

    def _draws(self, row: str) -> list[Values]:
        """Settings that a row tries, as all others do, no more than the budget leaves beside its own."""
        tuning = self.matrix.tuning
        parameters = tuning.rows.get(row, tuning.parameters)
        if not parameters:
            return []
        points = itertools.product(*parameters.values())
        grid = [dict(zip(parameters, point, strict=True)) for point in points]
        start = placed(dump(self.base), self.matrix.rows[row]) if row in tuning.rows else dump(self.base)
        own = {path: value_at(start, path) for path in parameters}
        others = [point for point in grid if point != own]
        order = np.random.default_rng(tuning.seed).permutation(len(others))
        return [others[i] for i in sorted(order[: tuning.draws - 1])]

    def curves(self, chosen: Values) -> dict[str, list[tuple[Scalar, list[Cell]]]]:
        """Cells of each curve by path: (value, a cell a seed), in the order of values; the row has `chosen` values."""
        curves = self.matrix.sensitivity
        if curves is None:
            return {}
        out = {}
        for path, values in curves.over.items():
            own = value_at(dump(self.cell(curves.row, 0, chosen).config), path)
            points = values if any(_same(v, own) for v in values) else [*values, own]
            out[path] = [
                (value, [self.cell(curves.row, seed, {**chosen, path: value}) for seed in self.matrix.seeds])
                for value in sorted(points, key=_order)
            ]
        return out


def _same(a: Scalar, b: Scalar) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _order(value: Scalar) -> tuple[int, float, str]:
    """Numbers by size, then all else by its text (null last)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return (2 if value is None else 1), 0.0, str(value)


def load_matrix(path: str | Path, overrides: Sequence[str] = (), of_matrix: Sequence[str] = ()) -> Plan:
    """Read a matrix and its base; `overrides` change the base (`a.b=c`), `of_matrix` the matrix itself.

    Raises:
        ConfigError: every fault of the matrix, or of its rows, with its path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read matrix {path}: {why}; give a file of jobs/configs such as "
                          "compare-smoke.yaml") from None  # fmt: skip
    raw = plain_mapping(text, f"matrix {path}")
    if "data" in raw and "rows" not in raw:
        raise ConfigError(f"matrix {path}: got a configuration, expected a matrix, which names one as its base and has "
                          "rows and seeds, such as jobs/configs/compare-smoke.yaml")  # fmt: skip
    faults = [fault for text in of_matrix if (fault := override(raw, text))]
    return resolve(parse_matrix(raw, faults), overrides, Path(path).parent)


def parse_matrix(raw: Mapping[str, Any], faults: Sequence[str] = ()) -> Matrix:
    """Build a matrix from plain data; raises ConfigError with one line a fault."""
    matrix: Matrix | None = None
    try:
        matrix = Matrix.model_validate(raw)
    except ValidationError as error:
        faults = [*faults, *faults_of(error, Matrix)]
    if faults or matrix is None:
        raise ConfigError(f"{len(faults)} fault(s) in the matrix:\n" + "\n".join(f"  - {f}" for f in faults))
    return matrix


def resolve(matrix: Matrix, overrides: Sequence[str] = (), folder: Path = Path()) -> Plan:
    """The plan of a matrix, all of whose cells are valid. A base file is looked for in `folder`.

    Raises:
        ConfigError: a row, a value to try or a point of a curve does not fit the configuration.
    """
    if isinstance(matrix.base, str):
        base = load_config(folder / matrix.base, overrides)
    else:
        raw = placed(matrix.base, {})
        faults = [fault for text in overrides if (fault := override(raw, text))]
        base = validate(raw, faults)
    plan = Plan(matrix, base)
    faults = list(dict.fromkeys(_faults(plan)))
    if faults:
        raise ConfigError(f"{len(faults)} fault(s) in matrix {matrix.name}:\n" + "\n".join(f"  - {f}" for f in faults))
    return plan


def _faults(plan: Plan) -> Iterator[str]:
    matrix, known = plan.matrix, leaves_of(dump(plan.base))
    places = [(f"rows.{row}", values) for row, values in matrix.rows.items()]
    places.append(("tuning.parameters", dict.fromkeys(matrix.tuning.parameters)))
    places += [(f"tuning.rows.{row}", dict.fromkeys(own)) for row, own in matrix.tuning.rows.items()]
    if matrix.sensitivity:
        places.append(("sensitivity.over", dict.fromkeys(matrix.sensitivity.over)))
    unknown = [fault for place, values in places for path in values if (fault := _path_fault(place, path, known))]
    yield from unknown
    if not plan.base.stage2.enabled:
        yield "base: stage2.enabled is false, but rows are compared by their clicks"
    shown = [f.name for f in plan.base.data.features if f.kind == "categorical" and f.role != "event"]
    for feature in sorted({name for table in matrix.tables for name in table} - set(shown)):
        yield f"tables: {feature} is no categorical feature of impressions; there are: {', '.join(shown) or 'none'}"
    if matrix.noise and matrix.noise.planted and plan.base.data.path is not None:
        yield "noise.planted: noise can be planted in the generated log alone, and base.data.path names another"
    if not unknown:
        wrong = list(_value_faults(plan))
        yield from wrong or _study_faults(plan)


def _path_fault(place: str, path: str, known: Mapping[str, Any]) -> str | None:
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1)
        return f"{place}.{path}: no such key of the configuration" + (f"; did you mean {near[0]}?" if near else "")
    if path.partition(".")[0] in FIXED:
        return f"{place}.{path}: all rows share the prepared log, seeds and measure; set it in base, or by --set"
    return None


def _value_faults(plan: Plan) -> Iterator[str]:
    """Faults of every cell that may come to be, by where its values stand."""
    matrix = plan.matrix
    tries: list[tuple[str, str, Values]] = [(f"rows.{row}", row, {}) for row in matrix.rows]
    tries += [(f"rows.{row} with tuning", row, values) for row in matrix.rows for values in plan._draws(row)]
    if matrix.sensitivity:
        row = matrix.sensitivity.row
        tries += [(f"sensitivity.over.{p}", row, {p: v}) for p, vs in matrix.sensitivity.over.items() for v in vs]
    for place, row, values in tries:
        try:
            plan.cell(row, matrix.seeds[0], values)
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                yield f"{place}: {line.removeprefix('  - ')}"


def _study_faults(plan: Plan) -> Iterator[str]:
    """Rows whose attention the studies cannot read, or not as what they are named for, whatever tuning chooses."""
    noise, learnt = plan.matrix.noise, plan.matrix.learnt
    named = [("noise.sparse", noise.sparse, True), ("noise.dense", noise.dense, False)] if noise else []
    for place, row, sparse in [*named, *([("learnt.row", learnt.row, None)] if learnt else [])]:
        for model in (cell.config.model for cell in plan.tuned(row)):
            if model.name not in SHOW_ATTENTION:
                yield (f"{place}: row {row!r} is of model {model.name}, which has no attention to show; name a row of "
                       f"{' or '.join(SHOW_ATTENTION)}")  # fmt: skip
            elif sparse is not None and model.sparse != sparse:
                got, expected = ("densely", "by PGSA") if sparse else ("by PGSA", "densely")
                yield f"{place}: row {row!r} attends {got}; name a row that attends {expected}"


def to_yaml(matrix: Matrix) -> str:
    """The matrix as YAML that `parse_matrix` reads back."""
    return yaml.safe_dump(matrix.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def stored_plan(run: str, overrides: Sequence[str], of_matrix: Sequence[str]) -> Plan:
    """The plan of a comparison that goes on, changed by overrides.

    Raises:
        ArtifactError: there is no comparison in the folder.
    """
    folder = Folder(absolute(run))
    if not folder.exists("matrix.yaml"):
        raise ArtifactError(f"--resume: there is no comparison in {folder.uri}; give --config to start one there")
    raw = plain_mapping(folder.read("matrix.yaml"), f"{folder.uri}/matrix.yaml")
    faults = [fault for text in of_matrix if (fault := override(raw, text))]
    base = plain_mapping(folder.read("config.yaml"), f"{folder.uri}/config.yaml")
    return resolve(parse_matrix(raw | {"base": base}, faults), overrides)
