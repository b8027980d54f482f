"""vLLM's log files: where they are kept, the stages they tell of, and their throughput line."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TextIO

from labkit.errors import LabError

KEEP = 40
A_DAY = 86_400.0  # seconds
_number = count(1)

# What vLLM's own log lines mean to somebody who waits; each is shown once.
STAGES = [
    (re.compile(r"Resolved architecture: (\S+)"), "configuration read: {0}"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading weights took"), "weights loaded"),
    (re.compile(r"Warming up model for the compilation"), "compiling, which takes its time"),
    (re.compile(r"torch\.compile took|torch\.compile takes|saved AOT compiled"), "model compiled"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), "KV cache reserved: {0} tokens"),
    (re.compile(r"Graph capturing finished"), "CUDA graphs captured"),
    (re.compile(r"Application startup complete"), "HTTP server up"),
]

THROUGHPUT = re.compile(
    r"Avg prompt throughput: (?P<prompt>[\d.]+) tokens/s, "
    r"Avg generation throughput: (?P<generation>[\d.]+) tokens/s, "
    r"Running: (?P<running>\d+) reqs, Waiting: (?P<waiting>\d+) reqs, "
    r".*?KV cache usage: (?P<kv_usage>[\d.]+)%"
    r"(?:, Prefix cache hit rate: (?P<prefix_hits>[\d.]+)%)?"
)


@dataclass(frozen=True)
class Throughput:
    """One throughput line: tokens/s in and out, requests, and percentages of the KV cache."""

    prompt: float
    generation: float
    running: int
    waiting: int
    kv_usage: float
    prefix_hits: float | None


def throughput(text: str) -> list[Throughput]:
    """Every throughput line of a log, in order."""
    return [
        Throughput(
            prompt=float(m["prompt"]),
            generation=float(m["generation"]),
            running=int(m["running"]),
            waiting=int(m["waiting"]),
            kv_usage=float(m["kv_usage"]),
            prefix_hits=float(m["prefix_hits"]) if m["prefix_hits"] else None,
        )
        for m in THROUGHPUT.finditer(text)
    ]


def folder() -> Path:
    """Where logs are kept: LABKIT_LOGS, or a folder in the user's cache."""
    chosen = os.environ.get("LABKIT_LOGS")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "labkit" / "logs"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"Logs cannot be kept in {path}.",
            f"{error.strerror}: {error.filename}.",
            "Let the environment variable LABKIT_LOGS name a folder of yours.",
        ) from error
    return path


def new(kind: str) -> Path:
    """A fresh log file for an "engine" or a "server"; of many, those of days before are deleted."""
    _clear()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = folder() / f"{kind}-{stamp}-{os.getpid()}-{next(_number)}.log"
    path.touch(mode=0o600)
    return path


def _clear() -> None:
    """Delete the oldest logs, with the configurations beside them; today's may be in use."""
    found = []
    for path in folder().glob("*.log"):
        with suppress(FileNotFoundError):  # another kernel may be clearing too
            found.append((path.stat().st_mtime, path))
    for written, old in sorted(found)[:-KEEP]:
        if time.time() - written > A_DAY:
            old.unlink(missing_ok=True)
            old.with_suffix(".json").unlink(missing_ok=True)


def shorten(path: Path, tilde: bool = True) -> str:
    """A path as one would type it here: from the working directory, or from the home folder.

    With `tilde` False it is for what does not know that ~ is the home folder.
    """
    relative = os.path.relpath(path)
    if not relative.startswith("../../"):
        return relative
    home = str(Path.home())
    at_home = tilde and path.is_relative_to(home)
    return "~" + str(path).removeprefix(home) if at_home else str(path)


class Stages:
    """Prints each stage of a start as the log tells of it, with the seconds since the start."""

    def __init__(self, log: Path, stream: TextIO | None = None) -> None:
        self.log, self.stream = log, stream or sys.stdout
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.begin = self._position = log.stat().st_size
        self._rest = ""
        self._pending = list(STAGES)

    def text(self) -> str:
        """What the log has said since this start began."""
        with self.log.open("rb") as file:
            file.seek(self.begin)
            return file.read().decode(errors="replace")

    def show(self, text: str) -> None:
        """Print one stage now."""
        self.seconds[text] = time.monotonic() - self.started
        print(f"{self.seconds[text]:6.1f} s  {text}", file=self.stream, flush=True)

    def poll(self) -> None:
        """Print the stages that the log has reached since the last call."""
        for line in self._new_lines():
            for stage in list(self._pending):
                match = stage[0].search(line)
                if match:
                    self._pending.remove(stage)
                    self.show(stage[1].format(*match.groups()))

    def _new_lines(self) -> Iterator[str]:
        with self.log.open("rb") as file:
            file.seek(self._position)
            text = self._rest + file.read().decode(errors="replace")
            self._position = file.tell()
        *lines, self._rest = text.split("\n")
        yield from lines

    def poll_during(self, work: Callable[[], object]) -> object:
        """Run `work`, polling from a thread while it lasts; returns what it returns."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                self.poll()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            return work()
        finally:
            done.set()
            thread.join()
            self.poll()
