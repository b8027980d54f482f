import subprocess
import sys
from pathlib import Path

import psutil

from labkit import hardware
from labkit.hardware import Gpu, Machine, look

GIB = 1 << 30


def test_this_machine_is_seen_as_it_is():
    machine = look()
    assert 1 <= machine.cpus <= psutil.cpu_count()
    assert 0 < machine.ram_free_bytes <= machine.ram_bytes <= psutil.virtual_memory().total
    assert machine.build in ("cpu", "gpu")


def test_a_table_has_every_fact():
    machine = look()
    html, text = machine._repr_html_(), str(machine)
    for name, fact in machine.facts().items():
        assert name in html and fact in html and name in text and fact in text


def test_a_tighter_limit_further_up_wins(tmp_path, monkeypatch):
    inner = tmp_path / "pod" / "kernel"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    (inner.parent / "memory.max").write_text(f"{2 * GIB}\n")
    (inner.parent / "memory.current").write_text(f"{GIB}\n")
    (inner.parent / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 4}\n")
    groups = [
        (folder, "memory.max", "memory.current", "inactive_file")
        for folder in (inner, inner.parent)
    ]
    monkeypatch.setattr(hardware, "_memory_groups", lambda: groups)
    # Page cache that can be given back does not count as used.
    assert hardware._memory_limit() == (2 * GIB, GIB - GIB // 4)


def test_a_cpu_quota_counts(monkeypatch):
    monkeypatch.setattr(hardware, "_cpu_quotas", lambda: [(100_000, 100_000)])
    assert look().cpus == 1


def test_old_cards_and_the_wrong_build_fall_back_to_the_cpu():
    v100 = Gpu("Tesla V100", 32 * GIB, 32 * GIB, (7, 0))
    t4 = Gpu("Tesla T4", 15 * GIB, 15 * GIB, (7, 5))

    def on(build, *gpus):
        return Machine(2, "x86_64", (), GIB, GIB, GIB, gpus, build).accelerator

    assert on("gpu", t4) == "gpu" and t4.dtype == "half"
    assert on("gpu", v100) == "cpu" and on("cpu", t4) == "cpu" and on("gpu") == "cpu"


def test_ranks_share_the_processors_where_vllm_would_refuse(monkeypatch):
    monkeypatch.delenv(hardware.THREADS_BIND, raising=False)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    monkeypatch.setattr(hardware, "_nodes", lambda: [Path("node0")])
    assert hardware.thread_binding(1) is None
    assert hardware.thread_binding(2) == "0,1|2,3"
    assert hardware.thread_binding(5) == "0|1|2|3|6"
    assert hardware.thread_binding(6) is None, "vLLM says that there are too few"
    monkeypatch.setattr(hardware, "_nodes", lambda: [Path("node0"), Path("node1")])
    assert hardware.thread_binding(2) is None, "a node for each: vLLM sees to it"
    monkeypatch.setattr(hardware, "_nodes", lambda: [Path("node0")])
    monkeypatch.setenv(hardware.THREADS_BIND, "0|3")
    assert hardware.thread_binding(2) is None, "what the user has chosen stays"


def test_looking_loads_nothing_heavy():
    code = "import sys, labkit; labkit.look(); print('torch' in sys.modules, 'vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
