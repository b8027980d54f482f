"""The set-up: what it finds, what it does about it, and how it says what went wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerator
import pytest
import setup_lab
import steps

ROOT = Path(__file__).parents[2]
CPU = accelerator.Choice("cpu", "no NVIDIA GPU here")
OTHER_PYTHON = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"


def test_a_finished_venv_is_ready(venv):
    assert setup_lab.state_of(venv, "cpu") == ("ready", "")


def test_a_second_run_starts_no_installer(venv, monkeypatch, capsys):
    def refuse(label, *_):
        raise AssertionError(f"{label} was run")

    monkeypatch.setattr(setup_lab, "run_step", refuse)
    setup_lab.bring_up_to_date(venv, CPU, "")
    assert capsys.readouterr().out == ""


def lose_stamp(venv):
    (venv / setup_lab.STAMP).unlink()


def cut_stamp(venv):
    (venv / setup_lab.STAMP).write_text('{"build": "cp')


def lose_a_key_of_the_stamp(venv):
    (venv / setup_lab.STAMP).write_text('{"build": "cpu"}')


def lose_python(venv):
    (venv / "bin/python").unlink()


def point_python_nowhere(venv):
    lose_python(venv)
    (venv / "bin/python").symlink_to("/nonexistent/python3")


def replace_python_by_a_broken_one(venv):
    lose_python(venv)
    (venv / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (venv / "bin/python").chmod(0o755)


def replace_python_by_another(venv):
    lose_python(venv)
    (venv / "bin/python").write_text(f"#!/bin/sh\necho {OTHER_PYTHON}\n")
    (venv / "bin/python").chmod(0o755)


def lose_vllm(venv):
    shutil.rmtree(next(venv.glob("lib/python*/site-packages/vllm")))


def lose_kernel(venv):
    shutil.rmtree(venv / "share")


def lose_labkit(venv):
    (venv / "bin/labkit").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lose_stamp,
        cut_stamp,
        lose_a_key_of_the_stamp,
        lose_python,
        point_python_nowhere,
        replace_python_by_a_broken_one,
        replace_python_by_another,
        lose_vllm,
        lose_kernel,
        lose_labkit,
    ],
)
def test_a_broken_venv_is_made_anew(venv, damage):
    damage(venv)
    state, why = setup_lab.state_of(venv, "cpu")
    assert state == "anew" and why


def test_the_other_build_of_vllm_is_never_laid_over_this_one(venv):
    assert setup_lab.state_of(venv, "gpu") == ("anew", ".venv has the cpu build of vLLM")


def test_another_python_is_taken_only_where_it_is_asked_for(venv):
    state, why = setup_lab.state_of(venv, "cpu", OTHER_PYTHON)
    assert state == "anew" and f"asks for Python {OTHER_PYTHON}" in why


def test_a_moved_venv_is_made_anew(venv, tmp_path):
    moved = venv.rename(tmp_path / "elsewhere")
    assert setup_lab.state_of(moved, "cpu") == ("anew", "the folder was moved or copied here")


@pytest.mark.parametrize("name", ["requirements/cpu.txt", "pyproject.toml"])
def test_changed_requirements_bring_an_update(venv, tmp_path, monkeypatch, name):
    root = tmp_path / "root"
    (root / "requirements").mkdir(parents=True)
    for copied in ("requirements/cpu.txt", "pyproject.toml"):
        shutil.copy(ROOT / copied, root / copied)
    same = setup_lab.fingerprint("cpu", "3.11", venv, root)
    assert same == setup_lab.fingerprint("cpu", "3.11", venv)
    with (root / name).open("a") as file:
        file.write("# another line\n")
    assert setup_lab.fingerprint("cpu", "3.11", venv, root) != same

    changed = setup_lab.fingerprint("cpu", "3.11", venv, root)
    monkeypatch.setattr(setup_lab, "fingerprint", lambda *_: changed)
    assert setup_lab.state_of(venv, "cpu") == ("update", "the requirements have changed")


def run_steps(monkeypatch, stop_at=""):
    """Replaces the tools by a list of their labels; the one named fails."""
    done = []

    def note(label, *_):
        done.append(label)
        if stop_at and stop_at in label:
            raise KeyboardInterrupt

    monkeypatch.setattr(setup_lab, "run_step", note)
    monkeypatch.setattr(setup_lab, "check_space", lambda *_: None)
    return done


def test_an_update_keeps_the_environment(venv, monkeypatch):
    done = run_steps(monkeypatch)
    setup_lab.set_up(venv, "cpu", "update")
    assert not any("environment" in label for label in done)
    assert setup_lab.state_of(venv, "cpu") == ("ready", "")


@pytest.mark.parametrize("step", ["environment", "uv", "packages", "labkit", "kernel"])
def test_an_interrupted_set_up_leaves_no_stamp(venv, monkeypatch, step):
    run_steps(monkeypatch, stop_at=step)
    with pytest.raises(KeyboardInterrupt):
        setup_lab.set_up(venv, "cpu", "anew")
    assert setup_lab.state_of(venv, "cpu") == ("anew", "an earlier set-up did not finish")


def test_a_file_in_the_place_of_the_venv_is_left_alone(tmp_path):
    (tmp_path / ".venv").write_text("notes")
    with pytest.raises(steps.Failed, match="is not a folder"):
        setup_lab.make_venv(tmp_path / ".venv")
    assert (tmp_path / ".venv").read_text() == "notes"


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_the_bootstrap_knows_its_pins(build):
    for name in ("uv", "torch", setup_lab.VLLM_PACKAGE[build]):
        assert setup_lab.pinned(name, build)[0].isdigit()


def test_a_failure_is_three_sentences_and_no_traceback():
    answer = subprocess.run(
        [sys.executable, ROOT / "tools/setup_lab.py"],
        env=os.environ | {"LAB_ACCELERATOR": "tpu"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    first, why, next_ = answer.stderr.splitlines()
    assert first == "Set-up stopped at: choosing the build of vLLM."
    assert why == "Why:  LAB_ACCELERATOR is 'tpu', and can only be cpu or gpu."
    assert next_.startswith("Next: ")
