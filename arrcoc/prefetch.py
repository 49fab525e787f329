"""Encoding tiles before they are asked for, while nobody waits for an answer."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from arrcoc.records import Lod, Plan

logger = logging.getLogger(__name__)

Stopped = Callable[[], bool]
Job = Callable[[Stopped], object]
"""Work that asks now and then whether to stop, and does so within milliseconds."""

_PAUSE_SECONDS = 0.005
"""How long nobody must have asked anything before work begins: the next request may follow at once."""


class TilePrefetcher:
    """Runs one job at a time on a thread and a CUDA stream of its own, only while no request is in flight.

    A request stops the job that runs and keeps the one that waits; a new job replaces one that waits. Jobs
    go through `TileEncoder.prefetch` and `likely_next`.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        """Args: the model's device, and whether to work at all."""
        self.enabled = enabled
        self._device = device
        self._changed = threading.Condition()
        self._requests = 0
        self._job: Job | None = None
        self._running = self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Mark a request as in flight: no job runs until it is over.

        Waits for the job that runs, if any, to stop: so work done ahead and requests never share the device,
        nor does one run into the other's capture of a CUDA graph.
        """
        with self._changed:
            self._requests += 1
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._running)
            yield
        finally:
            with self._changed:
                self._requests -= 1
                assert self._requests >= 0, self._requests
                self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Run a job when no request is in flight; it replaces one that has not begun."""
        with self._changed:
            if not self.enabled or self._closed:
                return
            self._job = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="arrcoc-prefetch", daemon=True)
                self._thread.start()
                # The interpreter ends a daemon thread by unwinding its stack, and one inside torch with it
                # the process: so it has to have ended before.
                atexit.register(self.close)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Forget the job that waits, let the one that runs stop, and wait until it has."""
        with self._changed:
            self._job = None
            self._requests += 1  # which stops what runs
            self._changed.wait_for(lambda: not self._running)
            self._requests -= 1
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until no job waits or runs; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._job is None and not self._running, timeout)

    def stop(self) -> None:
        """Begin and store nothing any more, without waiting for the job that runs to stop."""
        with self._changed:
            self._closed, self._job = True, None
            self._changed.notify_all()

    def close(self) -> None:
        """Stop for good, and wait until what runs has stopped; by itself when the interpreter ends."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _stopped(self) -> bool:
        return self._requests > 0 or self._closed

    def _idle(self) -> bool:
        return self._job is not None and self._requests == 0

    def _run(self) -> None:
        stream = _stream(self._device)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._idle() or self._closed)
                if not self._closed:
                    self._changed.wait_for(lambda: self._requests > 0 or self._closed, _PAUSE_SECONDS)
                if self._closed:
                    atexit.unregister(self.close)
                    return
                if not self._idle():
                    continue
                job, self._job, self._running = self._job, None, True
            assert job is not None, "an idle moment has a job"
            self._do(job, stream)
            del job
            with self._changed:
                self._running = False
                self._changed.notify_all()

    def _do(self, job: Job, stream: torch.cuda.Stream | None) -> None:
        try:
            with torch.cuda.stream(stream):  # does nothing for None
                job(self._stopped)
        except Exception:
            # A request that needs these tiles encodes them itself, and raises what there is to raise.
            logger.exception("prefetching tiles failed")


def likely_next(plan: Plan, most: int) -> dict[Lod, torch.Tensor]:
    """Tiles that the next question about an image is likely to want.

    Candidates are all tiles below the LOD that most refined tiles have. Each counts by its own relevance or
    by half that of its most relevant refined neighbour (of eight), whichever is more: so runners-up come
    first, and what surrounds a refined tile comes before what nobody looked at.

    Args:
        plan: of the question before.
        most: how many tiles at most.

    Returns:
        By LOD, int64 [K] raster indices, ascending; empty where the plan refines nothing.
    """
    refined = plan.lod > Lod.BACKGROUND
    if most <= 0 or not bool(refined.any()):
        return {}
    level = Lod(int(torch.mode(plan.lod[refined]).values))
    lit = torch.where(refined, plan.relevance, torch.zeros_like(plan.relevance))
    around = F.max_pool2d(lit[None, None], kernel_size=3, stride=1, padding=1)[0, 0]
    score = torch.maximum(plan.relevance, around / 2).masked_fill(plan.lod >= level, -1.0).flatten()
    found = score.topk(min(most, len(score)))
    return {level: found.indices[found.values >= 0].sort().values}


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
