"""Where the time of a run goes, and how long the rest of it will take."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

PATIENCE, AGAIN = 1.5, 15.0  # seconds of silence before a stage says what it does, and before it does so again
STAGES = {
    "anchor": "losses at w*",
    "check": "proving that the passes give the losses of the model's own call",
    "diagnostics": "what the run is worth",
    "fit": "what the sampler needs at w*",
    "pilot": "measuring how passes and steps are best made",
    "plan": "timing a step",
    "prefix": "looking for layers before the sampled ones",
}


class Timings:
    """Seconds spent per stage; of a stage within another, in the inner one only, so that they add up."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = 0.0  # seconds that stages within the present one have taken
        self._progress = progress or Progress(False)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        before, self._within, start = self._within, 0.0, time.perf_counter()
        try:
            with self._progress.waiting(STAGES.get(stage)):
                yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[stage] += elapsed - self._within
            self._within = before + elapsed


class Progress:
    """A progress bar with an ETA, over SGLD steps or samples, and lines of text; nothing when switched off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Print to stderr."""
        if self.enabled:
            print(text, file=sys.stderr, flush=True)

    def start(
        self, total: int | None, done: int = 0, *, what: str = "sampling", unit: str = "step", stays: bool = True
    ) -> None:
        """Show the bar, at once, over `total` steps (None: nobody knows how many); one that `stays` is seen later."""
        self.stop()
        if self.enabled:
            from tqdm.auto import tqdm  # a notebook's own bar there; slow to import

            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, mininterval=0.5, dynamic_ncols=True, leave=stays
            )

    def stop(self) -> None:
        """The bar stays as it is, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def update(self, count: int = 1, note: str = "") -> None:
        """So many more steps are done; the note stands at the end of the bar."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)

    def waiting(self, what: str | None) -> AbstractContextManager[None]:
        """Say what is being done where it takes longer than that and no bar shows it; nothing of None."""
        return nullcontext() if what is None or not self.enabled else self._waiting(what)

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        done, start = threading.Event(), time.perf_counter()

        def tell() -> None:
            wait = PATIENCE
            while not done.wait(wait):
                if self._bar is None:
                    self.say(f"{what} ({duration(time.perf_counter() - start)})")
                wait = AGAIN

        thread = threading.Thread(target=tell, name="lossk waiting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def duration(seconds: float) -> str:
    """A time span for people: 45 s, 12 min, 7 h 2 min, 3 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def as_table(reasons: Sequence[str]) -> list[str]:
    """Lines "name = value: why" in aligned columns."""
    split = [(*head.split(" = ", 1), why) for head, _, why in (reason.partition(": ") for reason in reasons)]
    name, value = (max((len(row[i]) for row in split), default=0) for i in (0, 1))
    return [f"  {row[0]:{name}} = {row[1]:{value}} : {row[2]}" for row in split]
