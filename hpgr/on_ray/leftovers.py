"""What trials leave behind that nobody will ask for: checkpoints once they have ended, and weights that cannot win."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from hpgr.artifacts import Folder
from hpgr.errors import HpgrError
from hpgr.search.study import Ended, Study
from hpgr.training.two_stage import clear, has_ended

GONE_AFTER_SECONDS = 15.0 + float(os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"])
"""A trial that was stopped early still writes until Tune has killed its process, which it does within this time."""


class Leftovers:
    """Deletes them while a search goes on, or many trials of large catalogues fill the disk.

    What a trial leaves is read from the study alone, so a search that was killed before it came to that makes up for
    it. A trial that was once the best keeps its weights: it was shown to the user as a whole run.
    """

    def __init__(self, folder: Folder, study: Study, clock: Callable[[], float]) -> None:
        self._folder, self._study, self._clock = folder, study, clock
        self._cleared: set[Ended] = set()

    def clear(self) -> None:
        """Of trials whose process must be gone by now."""
        for trial in self._study.ended():
            if trial not in self._cleared and self._clock() - trial.stopped > GONE_AFTER_SECONDS:
                self._clear(trial)

    def clear_all(self) -> None:
        """When no trial runs any more; what a process that was late to die has written since goes, too."""
        for trial in self._study.ended():
            self._clear(trial)

    def _clear(self, trial: Ended) -> None:
        run, stage1 = self._folder.sub("trials").sub(trial.name), self._folder.sub("stage1").sub(trial.stage1)
        with suppress(HpgrError):  # what is refused now is tried again
            clear(run.sub("stage2"), trial.may_win or run.exists("metrics.json"))
            if trial.stage1 and has_ended(stage1):  # its weights are for trials to come
                clear(stage1)
            self._cleared.add(trial)
