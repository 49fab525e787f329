"""The Python 3.9 process of `tensorrt86.py`: started, listened to, killed at a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import torch
from tensorrt86_cases import ROOT
from tensorrt86_timing import say


class Child:
    """The Python 3.9 process of one folder, killed at a deadline."""

    def __init__(self, bundle: Path, folder: Path, seconds: float) -> None:
        libraries = [bundle / "stubs", bundle / "py39/usr/lib/x86_64-linux-gnu", bundle / "site39/tensorrt"]
        environment = os.environ | {
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONHOME": str(bundle / "py39/usr"),
            "PYTHONPATH": f"{bundle / 'site39'}:{ROOT}",
        }
        self.folder, self.lines, self.built = folder, [], threading.Event()  # type: ignore[var-annotated]
        program = [str(bundle / "py39/usr/bin/python3.9"), str(ROOT / "benchmarks/tensorrt86_run.py")]
        with (folder / "errors.txt").open("w") as errors:
            self._process = subprocess.Popen(
                [*program, str(folder), libcudart()],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._timer = threading.Timer(seconds, self._process.kill)
        self._timer.start()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            say(line.strip())
            if line.startswith("{"):
                self.lines.append(json.loads(line))
                if self.lines[-1]["kind"] == "built":
                    self.built.set()
        self.built.set()

    def wait(self, seconds: float) -> None:
        """Until its plan is built or refused; it is killed after so many seconds."""
        if not self.built.wait(max(seconds, 0)):
            say(f"{self.folder.name}: not built in time, killed")
            self.lines.append({"kind": "killed while building"})
            self._process.kill()

    @property
    def measured(self) -> bool:
        """Whether it has measured every profile."""
        return any(line["kind"] == "done" for line in self.lines)

    def stop(self) -> None:
        """End it; what it told so far is kept."""
        self._process.kill()
        self._reader.join()
        self._timer.cancel()
        self._process.wait()

    def go(self) -> None:
        """Let it measure what it has built, and wait until it has."""
        self.built.wait()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.close()
        except BrokenPipeError:
            say("it has ended before it could measure")
        self._reader.join()
        self._timer.cancel()
        code = self._process.wait()
        if code != 0:
            say(f"exit {code}; " + (self.folder / "errors.txt").read_text()[-2500:])
        log = self.folder / "tensorrt.log"
        if log.is_file():
            lines = log.read_text(errors="replace").splitlines()
            say("log: " + "\n     ".join(line[:220] for line in lines[-(6 if code == 0 else 20) :]))


def libcudart() -> str:
    """Path of the CUDA runtime that torch has loaded."""
    torch.cuda.init()
    maps = Path("/proc/self/maps").read_text().split()
    return next(word for word in maps if "/libcudart" in word)
