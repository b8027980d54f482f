"""A finished .venv in miniature: all that the set-up looks at, and nothing else."""

import sys
from pathlib import Path

import pytest
import setup_lab

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A folder that the set-up takes for a finished .venv with the CPU build."""
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    while part := setup_lab.lost_part(folder, PYTHON):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).touch()
    setup_lab.write_stamp(folder, "cpu")
    return folder
