"""The mean of two models' weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit.tiny import MODEL_DIR
from labkit.tiny.average import average


@pytest.fixture
def pair(tmp_path):
    later = shutil.copytree(MODEL_DIR, tmp_path / "later")
    earlier = shutil.copytree(MODEL_DIR, tmp_path / "earlier")
    for shard in earlier.glob("*.safetensors"):
        save_file({name: value + 1 for name, value in load_file(shard).items()}, shard)
    return earlier, later


def test_each_weight_lies_between(pair, tmp_path):
    earlier, later = pair
    average(earlier, later, 0.75, tmp_path / "mean")
    for shard in later.glob("*.safetensors"):
        found = load_file(tmp_path / "mean" / shard.name)
        for name, value in load_file(shard).items():
            wanted = 0.75 * value.float() + 0.25 * (value + 1).float()
            assert torch.equal(found[name], wanted.to(value.dtype)), name
    assert (
        json.loads((tmp_path / "mean" / "training.json").read_text())["share_of_this_run"] == 0.75
    )


def test_another_network_is_refused(pair, tmp_path):
    earlier, later = pair
    for shard in earlier.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(KeyError):
        average(earlier, later, 0.5, tmp_path / "mean")
