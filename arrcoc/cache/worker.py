"""Work that nobody waits for, on one thread, with a bound on what may be waiting."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Worker:
    """Runs jobs one after another on a daemon thread that starts with the first of them."""

    def __init__(self, name: str, max_weight: int) -> None:
        """Args: the thread's name, and the most that waiting and running jobs may weigh together."""
        self._name, self._max_weight = name, max_weight
        self._jobs: deque[tuple[Job, int]] = deque()
        self._weight = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def weight(self) -> int:
        """What waiting and running jobs weigh."""
        return self._weight

    def offer(self, job: Job, weight: int) -> bool:
        """Queue a job, unless all would weigh too much or the worker is closed; returns whether it is."""
        with self._changed:
            if self._closed or self._weight + weight > self._max_weight:
                return False
            self._jobs.append((job, weight))
            self._weight += weight
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued or running; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._weight == 0 and not self._jobs, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Take no more jobs, and wait until those taken are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, weight = self._jobs.popleft()
            try:
                job()
            except Exception:
                # The next job has nothing to do with this one.
                logger.exception("%s: a job failed", self._name)
            del job
            with self._changed:
                self._weight -= weight
                self._changed.notify_all()
