"""Training survives being killed: it goes on where it was and ends with the same weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from labkit.tiny import MODEL_DIR
from labkit.tiny.progress import CHECKPOINT, load_checkpoint
from labkit.tiny.train import Recipe, Trainer

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 1024,
}  # fmt: skip
RECIPE = Recipe(tokens=30_000, batch_tokens=512, warm_up_steps=5, held_out_dialogues=4)

# Saves after every step, and rests a little so that the kill lands in the middle of the run.
SLOW_RUN = """
import sys, time
from pathlib import Path
from test_tiny_train import trainer
run = trainer(Path(sys.argv[1]))
step = run.step
run.step = lambda batches: (step(batches), time.sleep(0.2))
run.run(Path(sys.argv[2]), save_s=0)
"""


def trainer(folder: Path, recipe: Recipe = RECIPE) -> Trainer:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    return Trainer(recipe, folder, SIZES, tokenizer)


def start_slow_run(tmp_path: Path) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    command = [sys.executable, "-c", SLOW_RUN, tmp_path / "killed", tmp_path / "out"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def kill_after_first_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not (folder / CHECKPOINT).exists():
        assert process.poll() is None, "the training ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.05)
    time.sleep(0.7)  # a few steps more
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(120)
def test_killed_training_resumes_and_ends_the_same(tmp_path):
    process = start_slow_run(tmp_path)
    whole = trainer(tmp_path / "whole")
    whole.run(tmp_path / "out_whole")
    kill_after_first_checkpoint(process, tmp_path / "killed")
    resumed = trainer(tmp_path / "killed")
    assert 0 < resumed.progress.step < whole.progress.step
    resumed.run(tmp_path / "out")
    assert resumed.progress.step == whole.progress.step
    assert resumed.progress.position == whole.progress.position
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "out" / "config.json").exists()


def test_half_written_checkpoint_is_ignored(tmp_path):
    run = trainer(tmp_path)
    run.save()
    (tmp_path / (CHECKPOINT + ".part")).write_bytes(b"half of a file")
    assert load_checkpoint(tmp_path, run.parts, run.signature) is not None


def test_another_recipe_is_refused(tmp_path):
    trainer(tmp_path).save()
    with pytest.raises(ValueError, match="another recipe"):
        trainer(tmp_path, Recipe(tokens=1))


def test_learning_rate_warms_up_and_falls(tmp_path):
    run = trainer(tmp_path)
    progress = run.progress
    first = RECIPE.rate(progress)
    progress.step = RECIPE.warm_up_steps
    top = RECIPE.rate(progress)
    progress.tokens = RECIPE.tokens
    assert first < top
    assert RECIPE.rate(progress) == pytest.approx(RECIPE.learning_rate * RECIPE.least_rate)
