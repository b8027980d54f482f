"""The bundled model of the lab: its data generator, training, evaluation and weights."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
# 4-bit copies: how the weights are rounded, and how many share a scale.
VARIANTS = {"awq": ("awq", 128), "awq-g64": ("awq", 64), "rtn": ("round", 128)}
