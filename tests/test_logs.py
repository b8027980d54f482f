import io
import os
import time

import pytest

from labkit import faults, logs
from labkit.errors import LabError

LINE = (
    "(APIServer pid=7) INFO 11-23 07:53:59 [loggers.py:335] Engine 000: Avg prompt throughput: "
    "12.5 tokens/s, Avg generation throughput: 1044.5 tokens/s, Running: 16 reqs, Waiting: 3 reqs, "
    "{device} KV cache usage: 41.5%, Prefix cache hit rate: 62.0%\n"
)


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_the_throughput_line_is_read(device):
    [line] = logs.throughput("noise\n" + LINE.format(device=device))
    assert (line.prompt, line.generation, line.running, line.waiting) == (12.5, 1044.5, 16, 3)
    assert (line.kv_usage, line.prefix_hits) == (41.5, 62.0)


def test_a_line_without_prefix_caching_is_read():
    [line] = logs.throughput(
        LINE.format(device="GPU").replace(", Prefix cache hit rate: 62.0%", "")
    )
    assert line.prefix_hits is None


@pytest.fixture
def log_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_LOGS", str(tmp_path / "logs"))
    return tmp_path / "logs"


def test_logs_are_private_distinct_and_not_kept_for_ever(log_folder):
    made = [logs.new("server") for _ in range(logs.KEEP + 5)]
    assert len(set(made)) == len(made)
    assert made[-1].exists() and made[-1].stat().st_mode & 0o077 == 0
    assert all(path.exists() for path in made), "a log of today may be in use"
    made[0].with_suffix(".json").touch()
    for age, path in enumerate(reversed(made)):
        os.utime(path, (0, time.time() - 2 * logs.A_DAY - age))
    logs.new("server")
    assert len(list(log_folder.glob("*.log"))) == logs.KEEP + 1
    assert not made[0].exists() and not made[0].with_suffix(".json").exists()


def test_stages_are_shown_once_and_only_from_this_start(log_folder):
    log = logs.new("engine")
    log.write_text("Starting to load model old\n")
    screen = io.StringIO()
    stages = logs.Stages(log, screen)
    with log.open("a") as file:
        file.write("INFO Resolved architecture: Qwen2ForCausalLM\nKV cache size: 43,6")
        file.flush()
        stages.poll()
        file.write("48 tokens, Maximum\nINFO Resolved architecture: Qwen2ForCausalLM\n")
        file.flush()
        stages.poll()
    lines = screen.getvalue().splitlines()
    assert [line.split("s  ")[1] for line in lines] == [
        "configuration read: Qwen2ForCausalLM",
        "KV cache reserved: 43,648 tokens",
    ]
    assert "old" not in stages.text()


def test_stages_are_polled_while_work_goes_on(log_folder):
    log = logs.new("engine")
    screen = io.StringIO()

    def work():
        log.write_text("Loading weights took 0.1 seconds\n")
        time.sleep(0.3)
        return screen.getvalue()

    assert "weights loaded" in logs.Stages(log, screen).poll_during(work)


def test_paths_are_shown_as_one_would_type_them(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    assert logs.shorten(tmp_path / "a" / "b" / "x") == "b/x"
    assert logs.shorten(tmp_path / "y") == "../y"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert logs.shorten(tmp_path / "y") == "~/y"


def test_an_unknown_failure_is_told_by_its_root_cause(tmp_path):
    text = (
        "(EngineCore pid=3) ERROR 11-23 [core.py:1] torch.AcceleratorError: the real cause\n"
        "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    what, why, advice = faults.explain(text, tmp_path / "server.log")
    assert why == "torch.AcceleratorError: the real cause" and "server.log" in advice
    assert faults.root_cause("nothing went wrong") is None


# Messages of a GPU, as vLLM's sources word them; those of a CPU are provoked in test_engine.
GPU_MESSAGES = {
    "ValueError: Free memory on device cuda:0 (3.1/14.6 GiB) on startup is less than desired GPU "
    "memory utilization (0.92, 13.43 GiB). Decrease GPU memory utilization": "3.1 of its 14.6 GiB",
    "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your "
    "Tesla T4 GPU has compute capability 7.5.": "dtype='half'",
    "torch.AcceleratorError: CUDA error: no kernel image is available for execution": "V100",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "enforce_eager=True",
    "RuntimeError: Failed to infer device type": "nvidia-smi",
    "ValueError: World size (4) is larger than the number of available GPUs (1) in this node":
        "tensor_parallel_size=1",
}  # fmt: skip


@pytest.mark.parametrize(("message", "advice"), GPU_MESSAGES.items())
def test_failures_of_a_gpu_are_in_the_catalogue(message, advice, tmp_path):
    assert advice in " ".join(faults.explain(message, tmp_path / "x.log"))


def test_a_place_where_no_logs_can_be_kept_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_LOGS", str(tmp_path / "file" / "logs"))
    with pytest.raises(LabError, match="LABKIT_LOGS"):
        logs.new("engine")
