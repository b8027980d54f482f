import argparse
import importlib.util
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labkit
from labkit.errors import SettingsError
from labkit.hardware import Gpu, Machine
from labkit.settings import GATE, EngineSettings

GIB = 1 << 30


def machine(*gpus: Gpu, build: str = "cpu") -> Machine:
    return Machine(2, "x86_64", ("avx2",), 16 * GIB, 8 * GIB, 50 * GIB, gpus, build)


T4 = Gpu("Tesla T4", 15 * GIB, 14 * GIB, (7, 5))
H200 = Gpu("NVIDIA H200", 141 * GIB, 140 * GIB, (9, 0))
V100 = Gpu("Tesla V100", 32 * GIB, 31 * GIB, (7, 0))


def refusal(**values) -> str:
    with pytest.raises(SettingsError) as caught:
        EngineSettings(**{"model": "m", **values})
    return str(caught.value)


def test_a_misspelt_setting_suggests_the_right_one():
    assert "'max_model_len'" in refusal(max_modle_len=1024)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 0),
        ("max_model_len", "long"),
        ("gpu_memory_utilization", 1.5),
        ("gpu_memory_utilization", 0),
        ("tensor_parallel_size", 0),
        ("cpu_offload_gb", -1),
        ("port", 70000),
        ("dtype", "int4"),
        ("model", ""),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}=") and "Next:" in message


def test_tool_choice_needs_a_parser():
    assert "hermes" in refusal(enable_auto_tool_choice=True)


def test_each_card_gets_the_type_it_can_compute_in():
    for gpu, dtype in ((T4, "half"), (H200, "bfloat16")):
        settings = EngineSettings.for_machine("tiny", machine(gpu, build="gpu"))
        assert settings.dtype == dtype and settings.kv_cache_memory_bytes is None


def test_a_card_that_vllm_no_longer_supports_is_not_used():
    assert machine(V100, build="gpu").accelerator == "cpu"


def test_on_a_cpu_the_cache_has_a_set_size():
    settings = EngineSettings.for_machine("tiny", machine())
    assert settings.kv_cache_memory_bytes and settings.enforce_eager
    share = EngineSettings.for_machine("tiny", machine(), gpu_memory_utilization=0.2)
    assert share.kv_cache_memory_bytes is None


ARTICLE = {
    "dtype": "float16",
    "max_model_len": 10240,
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.9,
    "enforce_eager": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "cpu_offload_gb": 8,
    "quantization": "awq",
    "host": "0.0.0.0",
    "port": 9000,
}


@pytest.fixture(scope="module")
def vllm_parser() -> argparse.ArgumentParser:
    """The parser of the installed vLLM's own server."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def test_every_flag_of_the_article_is_understood_by_vllm(vllm_parser):
    settings = EngineSettings(model="m", **ARTICLE)
    parsed = vars(vllm_parser.parse_args(settings.server_args()))
    assert {name: parsed[name] for name in ARTICLE} == ARTICLE


VALUES = st.fixed_dictionaries(
    {"model": st.just("m")},
    optional={
        "dtype": st.sampled_from(["auto", "half", "bfloat16"]),
        "max_model_len": st.integers(1, 10**6),
        "gpu_memory_utilization": st.floats(0.01, 1),
        "kv_cache_memory_bytes": st.integers(1, 10**12),
        "enforce_eager": st.booleans(),
        "max_num_seqs": st.integers(1, 4096),
        "enable_prefix_caching": st.booleans(),
        "stream_interval": st.integers(1, 32),
        "seed": st.integers(0, 2**31),
        "port": st.integers(1, 65535),
        "served_model_name": st.sampled_from(["tiny", "qwen"]),
    },
)


@given(VALUES)
def test_command_line_and_keywords_say_the_same(vllm_parser, values):
    settings = EngineSettings(**values)
    parsed = vars(vllm_parser.parse_args(settings.server_args()))
    for name, value in settings.llm_kwargs().items():
        if name != "use_tqdm_on_load":
            assert parsed[name] == value, name


def test_a_server_for_others_gets_a_gate(vllm_parser):
    for host, gates in {"127.0.0.1": [], "localhost": [], "0.0.0.0": [GATE]}.items():
        parsed = vllm_parser.parse_args(EngineSettings(model="m", host=host).server_args())
        assert (parsed.host, parsed.middleware) == (host, gates)


def test_a_setting_of_several_parts_goes_as_json(vllm_parser):
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    settings = EngineSettings(model="m", structured_outputs_config=compact)
    parsed = vars(vllm_parser.parse_args(settings.server_args()))["structured_outputs_config"]
    assert (parsed if isinstance(parsed, dict) else vars(parsed)).items() >= compact.items()
    assert settings.llm_kwargs()["structured_outputs_config"] == compact


def test_a_longer_context_gets_a_cache_that_holds_it():
    tiny = labkit.find("tiny")
    settings = EngineSettings.for_machine("tiny", machine(), max_model_len=200_000)
    blocks = settings.kv_cache_memory_bytes // tiny.kv_bytes_per_token // 128
    assert (blocks - 1) * 128 >= 200_000, "vLLM keeps one block for itself"
    typed = EngineSettings.for_machine("tiny", machine(), max_model_len="200000")
    assert typed == settings, "a command line gives its numbers as text"
    with pytest.raises(SettingsError, match="max_model_len='long' is not possible"):
        EngineSettings.for_machine("tiny", machine(), max_model_len="long")


def test_a_share_of_memory_replaces_a_size():
    settings = EngineSettings.for_machine("tiny", machine())
    assert settings.but(gpu_memory_utilization=0.3).kv_cache_memory_bytes is None
    both = settings.but(gpu_memory_utilization=0.3, kv_cache_memory_bytes=1 << 26)
    assert both.kv_cache_memory_bytes == 1 << 26


def test_what_is_printed_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "models" / "Q"
    away = tmp_path / "a" / "b" / "c"
    away.mkdir(parents=True)
    monkeypatch.chdir(away)
    settings = EngineSettings(model=str(model))
    assert f"--model {model}" in settings.server_call().replace("\\\n   ", "")
    assert repr(str(model)) in settings.llm_call()


def test_the_gpu_build_is_started_by_the_kernels_own_python():
    settings = EngineSettings(model="Qwen/Qwen2.5-7B-Instruct", max_model_len=1024)
    command = settings.server_command("gpu")
    assert command[0] == sys.executable and command[3:5] == ["serve", settings.model]
    assert importlib.util.find_spec(command[2]), "its script need not be on the PATH"
    assert "--model" not in command
    assert settings.server_command("cpu")[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]


def test_the_server_stays_on_loopback_unless_told_otherwise():
    args = EngineSettings(model="m").server_args()
    assert args[args.index("--host") + 1] == "127.0.0.1"
