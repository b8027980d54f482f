"""What the tests share: checkpoints on disk, and one real server for all that talk to one."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

import labkit
from labkit.weights import BUNDLED

# The same examples at every run: whoever types `make test` hears of what they changed, and of
# nothing else. `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)  # of a busy machine
settings.load_profile("repeatable")


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to be broken."""
    copy = tmp_path / "model"
    shutil.copytree(BUNDLED["tiny"], copy)
    return copy


@pytest.fixture
def index_of():
    """Reads a checkpoint's index of shards."""
    return lambda path: json.loads((path / "model.safetensors.index.json").read_text())


@pytest.fixture(scope="session")
def server():
    """The real server with the bundled model, started once for the whole session."""
    with labkit.launch("tiny", enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        yield server
