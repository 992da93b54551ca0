"""Run configs: a YAML file that names a task and everything `build_kernel` needs, and replays the run it is beside."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lossk.checks import check_device, check_integer, check_mapping, check_optional, check_path, check_text
from lossk.cli.trust import task_function
from lossk.recipes import RecipeTask, packaged_config, packaged_names
from lossk.samplers.samplers import KINDS, read_sampler
from lossk.settings import check_settings
from lossk.task.passes import Passes

MOST_THREADS = 4096
BUILD_KEYS = (
    "num_chains", "num_draws", "tile", "panel", "dtype", "centering", "form", "memory", "backend", "device",
    "precision", "seed",
)  # fmt: skip
MOST_VALUES = 1_000_000  # of a YAML file, its aliases written out


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, replayable.

    Attributes:
        task: "module:function"; called with `task_args`, returns a `lossk.recipes.RecipeTask`.
        build: arguments of `lossk.build_kernel`.
        sampler: arguments of `lossk.SGLD`, or of another sampler named by `kind`: {kind: gaussian, sigma: 0.01}.
        passes: arguments of `lossk.Passes`; None leaves them to `build_kernel`, and the replay names what it chose.
        out: path of the `.lossk` store.
        picture: path of a PNG, or None.
        report: path of the HTML report, or None.
        threads: torch's threads for this run; None leaves them. Small networks run best, and most repeatably, on one.
    """

    task: str
    task_args: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)
    passes: Mapping[str, Any] | None = None
    out: str = "out.lossk"
    picture: str | None = None
    report: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if check_text("task", self.task).count(":") != 1:
            raise ValueError(f"task must be 'module:function', got {self.task!r}")
        if self.threads is not None:
            check_integer("threads", self.threads, 1, ceiling=MOST_THREADS)
        for name in ("task_args", "build", "sampler"):
            check_mapping(name, getattr(self, name))
        check_optional(check_mapping, "passes", self.passes)
        for name in ("picture", "report"):
            check_optional(check_path, name, getattr(self, name))
        if check_path("out", self.out).suffix != ".lossk":
            raise ValueError(f"out must end in .lossk, got {self.out!r}")
        refuse_unknown("build", self.build, BUILD_KEYS)
        kind = KINDS.get(check_text("sampler.kind", self.sampler.get("kind", "sgld")))
        if kind is not None:  # an unknown kind is refused by read_sampler
            refuse_unknown("sampler", self.sampler, ["kind", *(f.name for f in dataclasses.fields(kind))])
        read_sampler(self.sampler)
        if self.passes is not None:
            refuse_unknown("passes", self.passes, [f.name for f in dataclasses.fields(Passes)])
            Passes(**self.passes)
        check_device("device", self.build.get("device"))
        check_settings(**{key: value for key, value in self.build.items() if key != "device"})

    def to_yaml(self) -> str:
        """The file that replays this run with `lossk run`."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in plain.items()}
        return yaml.safe_dump(plain, sort_keys=False)

    def make_task(self, *, trusted: bool = True) -> RecipeTask:
        """Import the task's function and call it. Modules in the current folder can be named.

        Args:
            trusted: False for a config that nobody asked to run; it may then name packaged recipes only.

        Raises:
            ValueError: no such module, function or argument, or it does not return a RecipeTask.
        """
        function = task_function(self.task, self.task_args, trusted=trusted)
        parameters = inspect.signature(function).parameters
        if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
            refuse_unknown("task_args", self.task_args, list(parameters))
        task = function(**self.task_args)
        if not isinstance(task, RecipeTask):
            raise ValueError(f"task {self.task!r} must return a lossk.recipes.RecipeTask, got {type(task).__name__}")
        return task


def load_config(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a packaged recipe's config by its name, or a YAML file.

    Args:
        overrides: dotted keys ("build.num_draws") to values.

    Raises:
        ValueError: no such recipe or file, not a mapping, or an unknown key (the nearest known one is named).
    """
    check_text("config", name_or_path)
    path = packaged_config(name_or_path) or check_path("config", name_or_path)
    if not path.is_file():
        raise ValueError(
            f"config: there is no config file or recipe {name_or_path!r}; recipes: {', '.join(packaged_names())}"
        )
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise ValueError(f"{name_or_path} must hold a mapping, got {type(plain).__name__}")
    known = [f.name for f in dataclasses.fields(RunConfig)]
    for key, value in (overrides or {}).items():
        head, _, rest = key.partition(".")
        if rest:
            section = plain.get(head) or {}
            if not isinstance(section, dict):
                raise ValueError(f"--set {key}: {head} holds no mapping")
            plain[head] = {**section, rest: value}
        else:
            plain[head] = value
    refuse_unknown("config", plain, known)
    if not isinstance(plain.get("task"), str):
        raise ValueError(f"{name_or_path} must name its task as 'module:function', got {plain.get('task')!r}")
    for section in ("task_args", "build", "sampler"):
        plain[section] = plain.get(section) or {}
        if not isinstance(plain[section], dict):
            raise ValueError(f"{section} must hold a mapping, got {type(plain[section]).__name__}")
    if plain.get("passes") is not None and not isinstance(plain["passes"], dict):
        raise ValueError(f"passes must hold a mapping, got {type(plain['passes']).__name__}")
    return RunConfig(**plain)


def parse_override(text: str) -> tuple[str, Any]:
    """ "build.num_draws=50" -> ("build.num_draws", 50); the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--set needs key=value, got {text!r}")
    try:
        return key, parse_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: {value!r} is not valid YAML") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 calls it text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Plain data from YAML; nothing executable.

    Raises:
        yaml.YAMLError: not YAML, or values that no config holds: without end, or more than a million by aliases.
    """
    try:
        plain = yaml.load(text, Loader=_Loader)
        size = _written_out(plain, {})
    except (ValueError, OverflowError, RecursionError) as error:  # a date or number that is none; nested without end
        raise yaml.YAMLError(str(error)) from error
    if size > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for {size:,} values, of at most {MOST_VALUES:,}")
    return plain


def _written_out(plain: Any, known: dict[int, int]) -> int:
    """How many values an error message, say, would print: YAML's aliases take no room until then."""
    if not isinstance(plain, (dict, list, set, tuple)):
        return 1
    if id(plain) not in known:
        parts = [*plain.keys(), *plain.values()] if isinstance(plain, dict) else plain
        known[id(plain)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(plain)]


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file, in UTF-8.

    Raises:
        ValueError: naming the file, it is not valid YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def refuse_unknown(where: str, given: Mapping[str, Any], known: Any) -> None:
    """Raise ValueError for a key that is not known, naming the nearest one that is."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ValueError(f"{where} has no key {key!r}{hint}")
