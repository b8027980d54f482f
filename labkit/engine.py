"""The real vllm.LLM in this kernel: one at a time, started and ended cleanly."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from labkit import faults, hardware, heap, logs
from labkit.errors import EngineError
from labkit.output import output_to
from labkit.settings import EngineSettings

if TYPE_CHECKING:
    from vllm import LLM

GUARD = Path(__file__).with_name("guard.py")

_current: "Engine | None" = None
_log: Path | None = None


class Engine:
    """One vLLM engine in this kernel; `llm` is the real vllm.LLM once started.

    Takes a model or whole EngineSettings, and settings to change. Starting an engine ends the
    one that ran before and waits for its memory. `in_process` says whether the engine shares
    the kernel's process (vLLM's own default is a process beside it).
    """

    def __init__(
        self, model: str | EngineSettings = "tiny", in_process: bool | None = None, **overrides: Any
    ) -> None:
        if isinstance(model, EngineSettings):
            self.settings = model.but(**overrides) if overrides else model
        else:
            self.settings = EngineSettings.for_machine(model, **overrides)
        # In one process a further engine starts in 0.3 s instead of 10. On a GPU that mode
        # does not give the memory back (vllm-project/vllm#21073).
        on_cpu = hardware.look().accelerator == "cpu"
        self.in_process = on_cpu if in_process is None else in_process
        self.log_path: Path | None = None
        self.seconds: dict[str, float] = {}
        self._llm: LLM | None = None
        self._guard: subprocess.Popen | None = None

    @property
    def llm(self) -> "LLM":
        """The running vllm.LLM; raises EngineError when the engine is not running."""
        if self._llm is None:
            raise EngineError("This engine is not running.", next="Call start() first.")
        return self._llm

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that fit into the KV cache which the engine reserved."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def start(self) -> Self:
        """Start the engine, showing its stages; raises EngineError with the root cause."""
        global _current
        if _current is not None:
            _current.stop()
        print(self.settings.llm_call(), end="\n\n", flush=True)
        self._prepare_environment()
        self.log_path = _kernel_log()
        if not self.in_process:
            self._guard = _watch_engines()
        try:
            with _environment(self.settings.environment()):
                self._load()
        except BaseException:
            self._end_guard()
            raise
        _current = self
        return self

    def stop(self) -> None:
        """End the engine and wait until its memory is back; doing it twice is fine."""
        global _current
        if self._llm is None:
            return
        before = heap.memory_in_use()
        llm, self._llm = self._llm, None
        with heap.stopping():
            llm.llm_engine.engine_core.shutdown()
        _retire(llm)
        del llm
        freed = before - heap.settle(at_once=self.in_process)
        self._end_guard()
        _current = None if _current is self else _current
        print(f"engine stopped, {max(0, freed) / 1e6:,.0f} MB freed", flush=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _load(self) -> None:
        with output_to(self.log_path) as screen:
            stages = logs.Stages(self.log_path, screen)
            try:
                self._llm = stages.poll_during(lambda: self._construct(stages))
            except BaseException as error:
                heap.forget(error)
                heap.settle()
                if not isinstance(error, Exception):  # the stop button
                    raise
                text = f"{stages.text()}\n{type(error).__name__}: {error}"
                raise EngineError(*faults.explain(text, self.log_path)) from error
            stages.show(f"ready: KV cache for {self.kv_cache_tokens:,} tokens")
            print(f"full log: {logs.shorten(self.log_path)}", file=screen, flush=True)
            self.seconds = stages.seconds

    def _construct(self, stages: logs.Stages) -> "LLM":
        if "vllm" not in sys.modules:
            stages.show("importing vLLM")
        with heap.importing():
            from vllm import LLM

        if self.in_process:
            _replace_kernels_once()
        with heap.starting() if self.in_process else nullcontext():
            return LLM(**self.settings.llm_kwargs())

    def _prepare_environment(self) -> None:
        """What vLLM reads from the environment when an engine is made."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if self.in_process else "1"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.in_process:
            # Each process of a compiler pool imports torch again, which a small pod cannot spare.
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(_logging_config(_kernel_log()))

    def _end_guard(self) -> None:
        if self._guard is not None:
            self._guard.terminate()
            self._guard.wait()
            self._guard = None


def _replace_kernels_once() -> None:
    """Spare further starts vLLM's look through all modules for kernels to replace: 0.1 s each.

    On a CPU it replaces those written in Triton; once replaced, they stay so.
    """
    from vllm.platforms import current_platform

    replace = current_platform.register_triton_kernel_overrides
    if not hasattr(replace, "cache_info"):
        current_platform.register_triton_kernel_overrides = cache(replace)


class _StoppedLLM:
    """What an LLM of a stopped engine becomes, so that no variable keeps its memory."""

    def __getattr__(self, name: str) -> Any:
        raise EngineError(
            "This LLM has been stopped.",
            "Its engine was ended, or another engine was started in this kernel.",
            "Start an engine and use its .llm.",
        )


def _retire(llm: "LLM") -> None:
    """Empty an LLM that a notebook's variables may still name (also IPython's _ and Out)."""
    vars(llm).clear()
    llm.__class__ = _StoppedLLM


@contextmanager
def _environment(given: dict[str, str]) -> Iterator[None]:
    """Variables for one start only: the next engine may have another number of ranks."""
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


def _kernel_log() -> Path:
    """This kernel's log: vLLM reads its logging configuration once, when it is imported."""
    global _log
    if _log is None:
        _log = logs.new("engine")
    return _log


def _logging_config(log: Path) -> Path:
    """A logging configuration that sends vLLM's lines to a file, in every process of it."""
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(levelname)s %(asctime)s [%(name)s] %(message)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "line"}
        },
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    path = log.with_suffix(".json")
    path.write_text(json.dumps(config))
    return path


def _watch_engines() -> subprocess.Popen:
    command = [sys.executable, str(GUARD), "watch", str(os.getpid())]
    return subprocess.Popen(command, start_new_session=True)
