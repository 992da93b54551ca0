"""The table of docs/kinds.md, from the tests themselves: `python tests/kinds_table.py` prints it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

FILES = (
    "layers",
    "sequences",
    "modules",
    "wrappers",
    "transformers",
    "dtypes",
    "losses",
    "loaders",
    "streams",
    "state",
    "paths",
    "processes",
    "interrupts",
)
EVERYTHING = "draws, steps, build, world"
FORM = "draws; steps with the form as training data; the form and all random streams"
COMPARED = {
    "test_a_frozen_encoder_keeps_its_fast_path_to_itself": "traces with and without a cut prefix; world",
    "test_without_gradients_another_function": "losses at w* against the user's, gradients enabled; or refused; world",
    "test_an_adapter_that_merges_by_itself": "steps of its own weights, unmerged; world",
    "test_an_embedding_with_a_largest_norm": "refused by name; world",
    "test_a_model_that_casts_by_itself": "draws; a run that gives finite losses; world",
    "test_within_the_users_autocast": "traces inside and outside the user's autocast, bitwise",
    "test_forms": FORM,
    "test_forms_that_batch_by_themselves": FORM,
    "test_forms_with_a_warning": "the same, and the warning",
    "test_a_sampler_of_its_own_gives_the_rows_in_its_order": "draws, row by row in the sampler's order",
    "test_several_probe_sets": "steps",
    "test_bytes_with_a_transform": "steps; the bytes stay bytes",
    "test_an_array_on_disk": "draws, steps",
    "test_random_streams_stay": "draws, steps; torch's, NumPy's and Python's random streams",
    "test_a_loaders_generator_stays": "draws, steps; the generator's state",
    "test_settings_are_copied": "equality after pickle (two protocols), copy and deepcopy; still frozen",
    "test_kernels_are_copied": "every number, diagnostics and `meta` after pickle, copy and deepcopy",
    "test_traces_are_copied": "every number and `meta` after pickle, copy and deepcopy",
    "test_cross_kernels_are_copied": "every number after pickle, copy and deepcopy",
    "test_a_model_is_copied_while_it_is_sampled": "the copy's outputs; mean losses; world",
    "test_two_threads": "kernels bitwise those of one after the other; world",
    "test_a_thread_of_its_own": "the kernel bitwise; the other model's training bitwise",
    "test_forks": "kernels bitwise those of the parent; world in each child",
    "test_a_fork_inherits_the_model": "the kernel bitwise; world in the parent",
    "test_while_reading": "world after Ctrl-C",
    "test_while_checking": "world after Ctrl-C, and the training that follows, bitwise",
    "test_in_the_pilot": "world after Ctrl-C, and the training that follows, bitwise",
    "test_while_sampling": "world after Ctrl-C, and the training that follows, bitwise",
    "test_a_store_that_was_interrupted_goes_on": "world after Ctrl-C; the resumed kernel bitwise",
    "test_among_given_weights": "world after Ctrl-C",
}


def tests_of(module: ModuleType) -> Iterator[tuple[str, list[str]]]:
    """(name, identifiers of its kinds) of each test; none where it is not one test for many kinds."""
    for name, function in vars(module).items():
        if not name.startswith("test_") or not inspect.isfunction(function):
            continue
        marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        kinds = [list(mark.args[1]) for mark in marks if mark.args[0] in ("kind", "form")]
        yield name, kinds[0] if len(marks) == 1 and kinds else []


def in_words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ").replace("-", " ")


def rows() -> list[str]:
    """The table's lines, without its head.

    Raises:
        KeyError: a test that does not check everything has no text on what it compares.
    """
    found = []
    for each in FILES:
        module = importlib.import_module(f"test_kinds_{each}")
        for name, kinds in tests_of(module):
            plain = "check(" in inspect.getsource(getattr(module, name))
            compared = COMPARED.get(name) or {True: EVERYTHING}[plain]
            file = f"test_kinds_{each}.py::{name}"
            found += [f"| {in_words(kind)} | `{file}[{kind}]` | {compared} |" for kind in kinds]
            found += [] if kinds else [f"| {in_words(name)} | `{file}` | {compared} |"]
    return found


if __name__ == "__main__":
    folder = Path(__file__).parent / "invariances" / "kinds"
    sys.path.insert(0, str(folder))
    files = [path.stem.removeprefix("test_kinds_") for path in folder.glob("test_kinds_*.py")]
    assert set(files) - {"docs"} == set(FILES)
    print("\n".join(rows()))
