"""Sweeps: strict grids, one row a run, and going on after an interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from labkit import records, runs, sweeps
from labkit.errors import RunError, SettingsError

PARAMETERS = 'MAX_MODEL_LEN = 512\nENFORCE_EAGER = True\nMODEL = "tiny"\nFAIL_AT: int | None = None'
BODY = """
import time
from labkit import values
assert MAX_MODEL_LEN != FAIL_AT, "this length was to fail"
time.sleep(0.2)
values.record(double=2 * MAX_MODEL_LEN, kind="eager" if ENFORCE_EAGER else "compiled")
"""


@pytest.fixture
def notebook(tmp_path) -> Path:
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(BODY),
    ]
    path = tmp_path / "measure.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


GRID = {"MAX_MODEL_LEN": [256, 1024], "ENFORCE_EAGER": [True, False]}


def quiet(report):
    from contextlib import nullcontext

    return nullcontext(lambda record: None)


@pytest.mark.timeout(180)
def test_each_combination_is_a_row(notebook, tmp_path):
    result = sweeps.run(notebook, GRID, {"FAIL_AT": 7}, out=tmp_path / "out", display=quiet)
    assert result.exit_code == 0
    frame = pd.read_csv(tmp_path / "out" / sweeps.CSV)
    assert list(zip(frame.MAX_MODEL_LEN, frame.ENFORCE_EAGER, strict=True)) == [
        (256, True), (256, False), (1024, True), (1024, False),
    ]  # fmt: skip
    assert (frame.double == 2 * frame.MAX_MODEL_LEN).all() and (frame.FAIL_AT == 7).all()
    assert set(frame.status) == {"ok"} and (frame.peak_memory_bytes > 0).all()
    stored = pd.read_parquet(tmp_path / "out" / sweeps.PARQUET)
    assert stored.pop("error").isna().all() and frame.pop("error").isna().all()
    pd.testing.assert_frame_equal(stored, frame, check_dtype=False)
    page = (tmp_path / "out" / records.PAGE_FILE).read_text()
    assert "plots/double.png" in page and "<th>MAX_MODEL_LEN</th>" in page
    assert (tmp_path / "out" / "plots" / "double.png").stat().st_size > 1000


@pytest.mark.timeout(180)
def test_a_failed_run_is_named_and_the_others_go_on(notebook, tmp_path):
    grid = {"MAX_MODEL_LEN": [256, 512, 1024]}
    result = sweeps.run(notebook, grid, {"FAIL_AT": 512}, out=tmp_path / "out", display=quiet)
    assert [record.status for record in result.notebooks] == ["ok", "cell_error", "ok"]
    assert result.exit_code == 1
    frame = pd.read_csv(tmp_path / "out" / sweeps.CSV)
    assert "this length was to fail" in frame.error[1] and frame.double.isna()[1]
    # Asked again, only what failed is run again.
    again = sweeps.run(notebook, grid, {"FAIL_AT": 512}, out=tmp_path / "out", display=quiet)
    assert [record.status for record in again.notebooks] == ["ok", "cell_error", "ok"]
    assert again.notebooks[0].seconds == result.notebooks[0].seconds


@pytest.mark.timeout(240)
def test_a_killed_sweep_goes_on_where_it_was(notebook, tmp_path):
    out = tmp_path / "out"
    lengths = ",".join(str(128 * n) for n in range(1, 9))
    command = [sys.executable, "-m", "labkit.cli", "sweep", str(notebook), "--out", str(out),
               "--grid", f"MAX_MODEL_LEN={lengths}"]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while sum(record.passed for record in records.saved(out)) < 2:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = {r.name: r.seconds for r in records.saved(out) if r.passed}
    assert 2 <= len(done) < 8
    ran = []
    grid = {"MAX_MODEL_LEN": [128 * n for n in range(1, 9)]}
    limits = runs.limits_of(600)

    def conduct(report):
        ran.extend(record.name for record in report.notebooks if not record.over)
        return runs.conduct(report, limits, quiet)

    result = sweeps.run(notebook, grid, out=out, conduct=conduct)
    assert len(ran) == 8 - len(done) and not done.keys() & set(ran)
    assert result.exit_code == 0
    assert len(pd.read_csv(out / sweeps.CSV)) == 8


def test_values_as_typed():
    assert sweeps.parse(["A=1,2", 'B="x,y",z', "C=[1,2],[3]"]) == {
        "A": ["1", "2"], "B": ['"x,y"', "z"], "C": ["[1,2]", "[3]"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "grid, said",
    [
        (["MAX_MODEL_LEM=1,2"], "Did you mean MAX_MODEL_LEN"),
        (["MAX_MODEL_LEN=1,,2"], "none of them empty"),
        (["MAX_MODEL_LEN="], "none of them empty"),
        (["MAX_MODEL_LEN"], "which values to take"),
        (["MAX_MODEL_LEN=1", "MAX_MODEL_LEN=2"], "twice"),
        (["MAX_MODEL_LEN=1.5"], "a whole number"),
        (["MAX_MODEL_LEN=512,-3"], "is not possible"),
        (["MAX_MODEL_LEN=" + ",".join(map(str, range(1, 1200)))], "at most 1,000"),
    ],
)
def test_a_wrong_grid_is_a_sentence_and_starts_nothing(notebook, tmp_path, grid, said):
    with pytest.raises(RunError) as refused:
        sweeps.run(notebook, sweeps.parse(grid), out=tmp_path / "out")
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_swept_cannot_be_fixed_as_well(notebook):
    with pytest.raises(RunError, match="both fixed and part"):
        sweeps.plan(notebook, {"MAX_MODEL_LEN": [1]}, {"MAX_MODEL_LEN": 2})


def test_a_folder_that_cannot_be_written_is_a_sentence(notebook, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        sweeps.run(notebook, GRID, out=tmp_path / "file" / "out")


def test_another_sweep_in_the_folder_is_left_alone(notebook, tmp_path):
    out = tmp_path / "out"
    sweeps._folder(out, sweeps.plan(notebook, GRID, {}))
    with pytest.raises(RunError, match="holds another sweep"):
        sweeps.run(notebook, {"MAX_MODEL_LEN": [1]}, out=out)


@pytest.mark.timeout(240)
def test_settings_are_swept_in_one_kernel():
    grid = {"max_model_len": [256, 512], "kv_cache_memory_bytes": [4 << 20, 1 << 16]}
    frame = sweeps.in_kernel("tiny", grid, lambda engine: {"tokens": engine.kv_cache_tokens})
    assert list(frame.max_model_len) == [256, 256, 512, 512]
    small, large = frame[frame.kv_cache_memory_bytes == 1 << 16], frame[frame.error.isna()]
    assert (large.tokens > 512).all() and (large.start_seconds > 0).all()
    assert len(small) == 2 and small.error.notna().all() and small.tokens.isna().all()


def test_unknown_settings_are_refused_before_any_engine_starts():
    with pytest.raises(SettingsError, match="enforce_eagre"):
        sweeps.in_kernel("tiny", {"enforce_eagre": [True]}, lambda engine: pytest.fail("started"))
