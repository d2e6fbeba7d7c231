"""Says in which phase of its start a run is: to the watchdog, and in status.json."""

from pretrain.index.files import Progress
from pretrain.loop.watchdog import Watchdog
from pretrain.run.status import Status


class Starting:
    """What is done from the meeting of the ranks to the first step."""

    def __init__(self, watchdog: Watchdog, status: Status) -> None:
        self._watchdog, self._status = watchdog, status

    def phase(self, name: str) -> None:
        """Call it when a phase begins. `name` says what is done: "reading the checkpoint"."""
        self._watchdog.phase(name)
        self._status.update(phase=name)

    def progress(self, progress: Progress) -> None:
        """Call it when the phase goes on."""
        self._watchdog.progress(progress.words)
        self._status.update(phase=progress.words)
