"""What goes on beside a search's trials: time and nodes noted, folders cleared, a table shown."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import ray
from optuna.exceptions import StorageInternalError
from ray.exceptions import RayError
from rich.live import Live
from rich.text import Text

from hpgr.errors import HpgrError
from hpgr.on_ray.searcher import Clock
from hpgr.search.study import Study

LOOK_EVERY_SECONDS = 2.0
SAVE_EVERY_SECONDS = 60.0
"""How often the study is brought to a store, which a kill leaves with no more than it got."""
BOARD_EVERY_SECONDS = 60.0
"""How often the table is printed where it cannot be redrawn in place."""
PASSING = (HpgrError, RayError, StorageInternalError)
"""What a store, Ray or a locked study refuse now, and the watch's next look may get."""


@contextmanager
def watched(study: Study, clock: Clock) -> Iterator[Watch]:
    """Keeps time, counts nodes and shows a table while the block runs."""
    watch = Watch(study, clock)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        study.save()


class Watch(threading.Thread):
    """Notes the time and the cluster's nodes, so that a search that is killed knows them; clears up behind trials;
    keeps a screen in view."""

    def __init__(self, study: Study, clock: Clock) -> None:
        super().__init__(daemon=True)
        self._study, self._clock, self._over = study, clock, threading.Event()
        self._shown = self._saved = time.monotonic()
        self.board: Callable[[], str] | None = None
        """What to show, once there is something."""
        self.clear: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Until the search is over."""
        with Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else nullcontext() as screen:
            while not self._over.wait(LOOK_EVERY_SECONDS):
                with suppress(*PASSING):
                    self._note()
                    self._save()
                    self.clear()
                    self._show(screen)

    def stop(self) -> None:
        self._over.set()
        self.join()
        with suppress(*PASSING):
            self._note()

    def _save(self) -> None:
        if time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
            self._saved = time.monotonic()
            self._study.save()

    def _show(self, screen: Live | None) -> None:
        if self.board is None:
            return
        if screen is not None:
            screen.update(Text(self.board()), refresh=True)
        elif time.monotonic() - self._shown > BOARD_EVERY_SECONDS:
            self._shown = time.monotonic()
            print(self.board(), flush=True)

    def _note(self) -> None:
        """Note the time, and the nodes that can work when they change."""
        at = self._clock()
        self._study.remember("seconds", at)
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
        now = [at, len(alive), sum(node["Resources"]["CPU"] for node in alive)]
        known = self._study.memory("nodes", [])
        if not known or known[-1][1:] != now[1:]:
            self._study.remember("nodes", [*known, now])
