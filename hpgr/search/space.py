"""What a search may vary: dotted configuration paths and their distributions, checked before anything runs."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, Field, ValidationError, model_validator

from hpgr.config import Config, Count, Natural, Positive, Section, dump, faults_of, override, plain_mapping, validate
from hpgr.errors import ConfigError

Scalar = bool | int | float | str | None
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
FIXED = ("data", "name", "seed", "resources", "checkpoints", "evaluation", "tracking")
"""Sections that no space may vary: trials share the prepared log and are compared on the same seed and measure; who
records the search changes nothing of it."""


class Distribution(Section):
    """Exactly one of choice, uniform, log_uniform, integer and log_integer."""

    choice: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """One of these values."""
    uniform: Pair | None = None
    """[low, high], both included."""
    log_uniform: Pair | None = None
    """[low, high], uniform in the logarithm; low above 0."""
    integer: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """[low, high], whole numbers, both included."""
    log_integer: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """[low, high], whole numbers, uniform in the logarithm; low above 0."""
    step: Positive | None = None
    """Grid of `uniform` and `integer`. Settings of stage 1 want one: trials that agree on it share the stage."""
    when: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    """Drawn only if these paths have this value (or one of these); otherwise the configuration's own value stays."""

    @model_validator(mode="after")
    def _one_kind(self) -> Distribution:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'none'}, expected exactly one of {', '.join(KINDS)}")
        low, high = (0, 1) if given[0] == "choice" else getattr(self, given[0])
        if low >= high:
            raise ValueError(f"{given[0]} got [{low:g}, {high:g}], expected low < high")
        if given[0].startswith("log") and low <= 0:
            raise ValueError(f"{given[0]} got low {low:g}, expected more than 0")
        if self.step is not None and given[0] not in ("uniform", "integer"):
            raise ValueError(f"step goes with uniform and integer, got it with {given[0]}")
        if self.step is not None and given[0] == "integer" and self.step != int(self.step):
            raise ValueError(f"step of integers got {self.step:g}, expected a whole number")
        if given[0] == "choice" and len({(type(c), c) for c in self.choice or []}) < len(self.choice or []):
            raise ValueError(f"choice got {self.choice}, expected different values")
        return self

    def optuna(self) -> CategoricalDistribution | FloatDistribution | IntDistribution:
        """The same as an Optuna distribution."""
        if self.choice is not None:
            return CategoricalDistribution(self.choice)
        if self.uniform or self.log_uniform:
            low, high = self.uniform or self.log_uniform or []
            return FloatDistribution(low, high, log=self.uniform is None, step=self.step)
        first, last = self.integer or self.log_integer or []
        return IntDistribution(first, last, log=self.integer is None, step=int(self.step or 1))

    def ends(self) -> list[Any]:
        """Values that must be valid for all others to be: every choice, or both ends."""
        return list(self.choice or self.uniform or self.log_uniform or self.integer or self.log_integer or [])

    def sample(self, rng: np.random.Generator) -> Any:
        """A random value, uniform (or log-uniform) over what can be drawn."""
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        low, high = self.ends()
        if self.step is not None or self.integer is not None:
            step = self.step or 1
            value = low + step * int(rng.integers(int((high - low) / step + 1e-8) + 1))
            return int(value) if self.integer is not None else self.on_grid(value)
        if self.log_integer is not None:
            return min(high, int(low * ((high + 1) / low) ** rng.random()))
        return float(low * (high / low) ** rng.random() if self.log_uniform else rng.uniform(low, high))

    def on_grid(self, value: Any) -> Any:
        """A drawn value as its grid is written: 0.3, not 0.30000000000000004, so that equal draws are the same."""
        if self.uniform is None or self.step is None:
            return value
        low, step = Decimal(str(self.uniform[0])), Decimal(str(self.step))
        return float(low + step * round((value - self.uniform[0]) / self.step))

    def holds(self, value: Any) -> bool:
        """Whether the value can be drawn."""
        if self.choice is not None:
            return any(isinstance(c, bool) == isinstance(value, bool) and c == value for c in self.choice)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.ends()
        steps = (value - low) / self.step if self.step else 0.0
        return bool(low <= value <= high and abs(steps - round(steps)) < 1e-8)


KINDS = ("choice", "uniform", "log_uniform", "integer", "log_integer")


class Sampler(Section):
    kind: Literal["tpe", "random"] = "tpe"
    """How trials are proposed."""
    seed: Natural = 0
    """Of the proposals."""
    startup_trials: Natural = 8
    """Random draws before TPE models what it has seen."""


class Scheduler(Section):
    kind: Literal["asha", "none"] = "asha"
    """Whether weak trials are stopped early."""
    grace_epochs: Count = 1
    """Epochs of stage 2 before a trial may be stopped."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """One in this many goes on at each rung."""


class Budget(Section):
    trials: Count = 32
    """Different configurations to try, the starting one included."""
    hours: Positive | None = None
    """No trial starts later than this but the first; running ones end. Preparing counts, and so do hours before a
    resume."""


Objective = Literal["auc", "keys", "seconds_a_million"]


class Space(Section):
    name: str = "search"
    """Begins the name of a search folder that was given none."""
    parameters: Annotated[dict[str, Distribution], Field(min_length=1)]
    """What may vary: a distribution for each dotted configuration path."""
    objectives: Annotated[list[Objective], Field(min_length=1, max_length=2)] = Field(
        default_factory=lambda: cast("list[Objective]", ["auc"])
    )
    """`auc` (validation, up); beside it `keys` (history events a candidate attends to a layer, down) or
    `seconds_a_million` (measured, to score a million candidates, down) for a Pareto front."""
    sampler: Sampler = Sampler()
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget()
    concurrency: Count | None = None
    """Most trials at once; null: as many as the cluster, fully scaled up, has room for."""

    @model_validator(mode="after")
    def _fits(self) -> Space:
        if self.objectives[0] != "auc" or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives got {self.objectives}, expected auc, alone or with one other")
        if len(self.objectives) > 1 and self.scheduler.kind == "asha":
            raise ValueError("scheduler.kind asha stops trials by AUC alone, which starves the cheap end of a Pareto "
                             "front; set scheduler.kind: none, or one objective")  # fmt: skip
        return self


def load_space(path: str | Path, overrides: Sequence[str] = ()) -> Space:
    """Read a space and apply `a.b=c` overrides.

    Raises:
        ConfigError: one line a fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read space {path}: {why}; give a file of tune_spaces/") from None
    return read_space(text, str(path), overrides)


def read_space(text: str, name: str, overrides: Sequence[str] = ()) -> Space:
    """A space from YAML text; `name` stands for it in errors. Raises ConfigError as `load_space`."""
    raw = plain_mapping(text, f"space {name}")
    faults = [fault for change in overrides if (fault := override(raw, change))]
    return parse_space(raw, faults)


def parse_space(raw: Mapping[str, Any], faults: Sequence[str] = ()) -> Space:
    """Build a space from plain data; raises ConfigError as `load_space`."""
    try:
        space = Space.model_validate(raw)
    except ValidationError as error:
        faults = [*faults, *faults_of(error, Space)]
    if faults:
        raise ConfigError(f"{len(faults)} fault(s) in the space:\n" + "\n".join(f"  - {f}" for f in faults))
    return space


def check(space: Space, config: Config) -> None:
    """Refuse a space that does not fit the configuration, before anything starts.

    Raises:
        ConfigError: paths that do not exist or may not vary, values out of a key's range, conditions on nothing, and
            starting values that the space does not hold (the search begins with them, so it never ends below them).
    """
    tree, leaves = dump(config), dict(_leaves(dump(config)))
    faults = [fault for path, d in space.parameters.items() for fault in _faults(path, d, space, tree, leaves)]
    if not config.stage2.enabled:
        faults.append("stage2.enabled is false, but trials are judged by stage 2's validation AUC")
    if faults:
        raise ConfigError(f"{len(faults)} fault(s) in space {space.name}:\n" + "\n".join(f"  - {f}" for f in faults))


def _faults(
    path: str, distribution: Distribution, space: Space, tree: dict[str, Any], leaves: dict[str, Any]
) -> list[str]:
    if path not in leaves:
        near = difflib.get_close_matches(path, leaves, n=1)
        return [f"{path}: no such key of the configuration" + (f"; did you mean {near[0]}?" if near else "")]
    if path.partition(".")[0] in FIXED:
        return [f"{path}: trials share the prepared log, seed and measure; set it for the whole search by --set"]
    if path == "stage2.enabled":
        return [f"{path}: trials are judged by stage 2's validation AUC, so it cannot vary"]
    is_whole = isinstance(leaves[path], int) and not isinstance(leaves[path], bool)
    if is_whole and (distribution.uniform or distribution.log_uniform):
        return [f"{path}: takes whole numbers; use integer or log_integer"]
    faults = []
    for value in distribution.ends():
        try:
            validate(placed(tree, {path: value}))
        except ConfigError as error:
            lines = [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
            faults += [f"{path}: value {value!r} is not allowed: {line}" for line in lines]
    drawn_at_start = all(_meets(leaves.get(p), wanted) for p, wanted in distribution.when.items())
    if not faults and drawn_at_start and not distribution.holds(leaves[path]):
        faults.append(f"{path}: the search starts from {leaves[path]!r}, which the space does not hold; widen it, or "
                      f"start elsewhere with --set {path}=...")  # fmt: skip
    faults += [f"{path}: {fault}" for p, wanted in distribution.when.items()
               for fault in _condition_faults(p, wanted, space, tree, leaves)]  # fmt: skip
    own = list(space.parameters)
    late = [p for p in distribution.when if p in own and own.index(p) >= own.index(path)]
    return faults + [f"{path}: when.{p} must stand above it in the space" for p in late]


def _condition_faults(path: str, wanted: Any, space: Space, tree: dict[str, Any], leaves: dict[str, Any]) -> list[str]:
    if path not in leaves:
        return [f"when.{path}: no such key of the configuration"]
    drawn = space.parameters.get(path)
    faults = []
    for value in wanted if isinstance(wanted, list) else [wanted]:
        try:
            taken = value_at(dump(validate(placed(tree, {path: value}))), path)
        except ConfigError as error:
            faults.append(f"when.{path}: value {value!r} is not allowed: {str(error).splitlines()[-1].strip(' -')}")
            continue
        if taken != value or isinstance(taken, bool) != isinstance(value, bool):
            faults.append(f"when.{path}: value {value!r} is read as {taken!r}; write that")
        elif drawn is not None and not drawn.holds(value) and not (drawn.when and value == leaves[path]):
            faults.append(f"when.{path}: value {value!r} is never drawn")
    if not faults and drawn is None and not _meets(leaves[path], wanted):
        faults.append(f"when.{path}: is always {leaves[path]!r}, never {wanted!r}, for the space does not vary it")
    return faults


def longest(space: Space, config: Config) -> int:
    """Epochs of stage 2 of the longest trial that the space can draw."""
    varied = space.parameters.get("stage2.epochs")
    return int(max([config.stage2.epochs, *(varied.ends() if varied else [])]))


def leaves_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a configuration's plain data by dotted path."""
    return dict(_leaves(tree))


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(path, node)]
    return [leaf for key, child in node.items() for leaf in _leaves(child, f"{path}.{key}" if path else key)]


def placed(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration's plain data with values at dotted paths."""
    out = copy.deepcopy(dict(tree))
    for path, value in values.items():
        *parents, last = path.split(".")
        node = out
        for part in parents:
            node = node[part]
        node[last] = value
    return out


def value_at(tree: Mapping[str, Any], path: str) -> Any:
    """Value of plain data at a dotted path."""
    node: Any = tree
    for part in path.split("."):
        node = node[part]
    return node


def draw(space: Space, tree: Mapping[str, Any], suggest: Callable[[str, Distribution], Any]) -> dict[str, Any]:
    """Values by path, asked of `suggest` in the space's order; conditions see what was drawn before them."""
    values: dict[str, Any] = {}
    for path, distribution in space.parameters.items():
        if all(_meets(values.get(p, value_at(tree, p)), wanted) for p, wanted in distribution.when.items()):
            values[path] = suggest(path, distribution)
    return values


def _meets(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else bool(value == wanted)


def starting_values(space: Space, config: Config) -> dict[str, Any]:
    """The configuration's own values at the space's paths, those whose conditions hold."""
    tree = dump(config)
    return draw(space, tree, lambda path, _: value_at(tree, path))


def to_yaml(space: BaseModel) -> str:
    """The space as YAML that `load_space` reads back."""
    plain = space.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
