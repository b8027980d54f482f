"""The bundled model of the lab: its data generator, training, evaluation and weights."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
