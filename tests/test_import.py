import subprocess
import sys

import pytest

import labkit

HEAVY = ("torch", "vllm", "transformers", "gradio", "openai", "pandas", "matplotlib")


def test_import_is_light():
    code = (
        "import time; start = time.perf_counter(); import labkit; "
        "seconds = time.perf_counter() - start; import sys; "
        f"print(seconds, [name for name in {HEAVY} if name in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    outputs = [run.stdout.split(" ", 1) for run in runs]
    assert min(float(seconds) for seconds, _ in outputs) < 0.3
    assert {loaded.strip() for _, loaded in outputs} == {"[]"}


def test_everything_named_is_importable_from_the_top():
    for name in labkit.__all__:
        assert getattr(labkit, name) is not None
    assert set(labkit.__all__) <= set(dir(labkit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(labkit, "nonsense")  # noqa: B009
