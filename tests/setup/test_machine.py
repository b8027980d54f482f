"""A machine that cannot run the lab is told so in a sentence before anything is installed."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import machine
import pytest
import steps

FIND_PYTHON = Path(__file__).parents[2] / "tools/find_python.sh"
GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 7), (3, 13, 0), (3, 14, 1)])
def test_a_python_that_vllm_has_wheels_for_is_taken(version):
    machine.check_python(version)


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 10, 13), (3, 15, 0)])
def test_any_other_python_is_refused(version):
    with pytest.raises(steps.Failed, match=f"this is Python 3.{version[1]}.{version[2]}"):
        machine.check_python(version)


@pytest.mark.parametrize(
    ("build", "system", "cpu", "libc", "flags", "why"),
    [
        ("cpu", "Darwin", "arm64", ("", ""), "", "this is Darwin"),
        ("cpu", "Linux", "ppc64le", GLIBC, "", "this is a ppc64le CPU"),
        ("cpu", "Linux", "x86_64", ("", ""), "avx2", "another C library"),
        ("cpu", "Linux", "x86_64", ("glibc", "2.28"), "avx2", "glibc 2.28"),
        ("cpu", "Linux", "x86_64", GLIBC, "flags : sse4_2 avx avx2x", "no AVX2"),
    ],
)
def test_a_machine_the_wheels_do_not_run_on_is_named(build, system, cpu, libc, flags, why):
    assert why in machine.why_unfit(build, system, cpu, libc, flags)


@pytest.mark.parametrize(
    ("build", "cpu", "flags"),
    [("cpu", "x86_64", "flags : avx avx2 fma"), ("cpu", "aarch64", ""), ("gpu", "x86_64", "")],
)
def test_a_fit_machine_is_fit(build, cpu, flags):
    assert machine.why_unfit(build, "Linux", cpu, GLIBC, flags) == ""


def test_this_machine_is_fit():
    machine.check_architecture("cpu")


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")(int(1.2e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(steps.Failed, match=r"cache has 1.2 GB free, and the gpu build needs"):
        machine.check_space("gpu", tmp_path / "not/yet/there/cache")


def find_python(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs find_python.sh where PATH has that folder and the shell's tools only."""
    for tool in ("grep", "sort", "tr", "sed"):
        (folder / tool).symlink_to(shutil.which(tool))
    return subprocess.run(
        ["/bin/sh", FIND_PYTHON],
        env={"PATH": str(folder)} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def old_python(folder: Path, name: str = "python3") -> None:
    """Puts a Python 3.9 there, as far as find_python.sh can tell."""
    script = '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18" && exit\nexit 1\n'
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def test_the_first_fit_python_on_the_path_is_found(tmp_path):
    old_python(tmp_path)
    (tmp_path / "python3.11").symlink_to(sys.executable)
    found = find_python(tmp_path)
    assert found.returncode == 0 and found.stdout.strip() == str(tmp_path / "python3.11")


def test_an_old_python_is_refused_with_what_to_install(tmp_path):
    old_python(tmp_path)
    found = find_python(tmp_path)
    assert found.returncode == 1 and found.stdout == ""
    assert "found here: Python 3.9.18." in found.stderr and "python3.11-venv" in found.stderr


def test_no_python_at_all_is_said(tmp_path):
    found = find_python(tmp_path)
    assert found.returncode == 1 and "found here: none." in found.stderr


def test_a_named_python_is_the_only_candidate(tmp_path):
    old_python(tmp_path, "named")
    (tmp_path / "python3").symlink_to(sys.executable)
    found = find_python(tmp_path, PYTHON=str(tmp_path / "named"))
    assert found.returncode == 1 and f"at PYTHON={tmp_path}/named" in found.stderr


def test_a_named_python_may_have_a_space_in_its_name(tmp_path):
    (tmp_path / "my python").symlink_to(sys.executable)
    found = find_python(tmp_path, PYTHON=str(tmp_path / "my python"))
    assert found.stdout.strip() == str(tmp_path / "my python")
