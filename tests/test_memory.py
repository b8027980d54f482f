"""The planner: exact where the config decides, and held to what the real engine reports."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest

import labkit
from labkit import hardware, memory, shapes, twin, weights
from labkit.advice import recommend
from labkit.errors import SettingsError, WeightsError
from labkit.hardware import GIB, MIB
from labkit.memory import Choices, Place, largest_step, plan
from labkit.shapes import Shape, published, published_config

SEVEN = "Qwen2.5-7B-Instruct"


def shape(name: str) -> Shape:
    return Shape.of(published_config(name), name)


def card(name: str) -> Place:
    return Place.of_card(shapes.cards()[name])


@pytest.mark.parametrize("name", weights.BUNDLED)
def test_weights_predicted_are_those_in_the_shards(name):
    checkpoint = labkit.find(name)
    assert Shape.of(checkpoint.config, name).weight_bytes() == checkpoint.weight_bytes


def test_seven_billion_is_as_its_card_says():
    assert shape(SEVEN).weight_bytes() == 2 * 7_615_616_512
    assert shape(SEVEN).kv_bytes_per_token() == 57_344
    assert shape(SEVEN).kv_bytes_per_token(kv_bits=8) == 57_344 // 2
    assert 5.5e9 < shape(f"{SEVEN}-AWQ").weight_bytes() < 5.7e9


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_weights_and_the_cache(ranks):
    whole = shape(SEVEN)
    each = whole.weight_bytes(ranks)
    assert whole.weight_bytes() <= each * ranks < whole.weight_bytes() * 1.001
    assert whole.kv_bytes_per_token(ranks) * ranks == whole.kv_bytes_per_token()


def test_more_ranks_than_kv_heads_hold_copies():
    assert shape(SEVEN).kv_bytes_per_token(8) == shape(SEVEN).kv_bytes_per_token(4)


def test_a_plan_adds_up():
    found = plan(shape(SEVEN), card("RTX 4090"))
    parts = (found.weight_bytes, found.activation_bytes, found.graph_bytes, found.library_bytes)
    assert found.budget_bytes == sum(parts) + found.kv_bytes
    assert found.kv_tokens == found.kv_blocks * found.block_size
    unused = found.kv_bytes - found.kv_tokens * found.kv_bytes_per_token
    assert 0 <= unused < found.block_size * found.kv_bytes_per_token
    assert found.longest_that_fits == min(found.kv_tokens - 16, 32768) and found.fits


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"enforce_eager": True}, "graph_bytes"),
        ({"kv_bits": 8}, "kv_bytes_per_token"),
        ({"cpu_offload_gb": 4}, "weight_bytes"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 512}, "activation_bytes"),
    ],
)
def test_each_way_out_makes_its_part_smaller_and_the_cache_larger(change, field):
    before, after = (plan(shape(SEVEN), card("RTX 4090"), c) for c in (None, Choices(**change)))
    assert getattr(after, field) < getattr(before, field)
    assert after.kv_tokens > before.kv_tokens


# What vLLM 0.32 reported on an H200 in 2026-11, eager, the engine of a program; twins of the 7B.
H200 = Place("NVIDIA H200", 150_109_880_320, capability=(9, 0))
REPORTED = (("tiny", 0.3, 29_031_600), (SEVEN, 0.6, 1_245_344), (f"{SEVEN}-AWQ", 0.6, 1_412_192))


@pytest.mark.parametrize(("name", "share", "reported"), REPORTED)
def test_the_plan_meets_what_an_h200_reported(name, share, reported):
    choices = Choices(gpu_memory_utilization=share, enforce_eager=True, offline=True)
    assert plan(shapes.find(name), H200, choices).kv_tokens == pytest.approx(reported, rel=0.01)


@pytest.mark.parametrize(
    ("place", "served", "offline", "requests"),
    [(card("RTX 4090"), 2048, 8192, 256), (card("A100-80"), 2048, 8192, 256),
     (H200, 8192, 16384, 1024), (replace(H200, total_bytes=180 * GIB), 16384, 16384, 1024)],
)  # fmt: skip
def test_the_largest_step_follows_from_the_card(place, served, offline, requests):
    assert largest_step(place, Choices()) == (served, requests)
    assert largest_step(place, Choices(offline=True)) == (offline, requests)
    chosen = Choices(max_num_batched_tokens=512, max_num_seqs=8, offline=True)
    assert largest_step(place, chosen) == (512, 8)


@pytest.mark.parametrize("name", published())
def test_every_published_shape_has_a_plan_on_every_card(name):
    for gpu in shapes.cards():
        found = plan(shape(name), card(gpu)).as_json()
        assert all(value >= 0 for value in found.values() if isinstance(value, int | float))
        assert json.dumps(found)


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(WeightsError) as refused:
        published_config("Qwen2.5-8B-Instruct")
    assert SEVEN in str(refused.value)


# ---- advice ---------------------------------------------------------------------------------


def settings(recommendation) -> dict[str, str]:
    return {advice.setting: advice.value for advice in recommendation.advice}


def test_a_4090_holds_seven_billion_in_16_bits():
    found = recommend(shape(SEVEN), card("RTX 4090"))
    assert found.plan.fits and "model" not in settings(found)
    assert settings(found)["dtype"] == "bfloat16"
    assert found.plan.max_concurrency >= 1


def test_a_t4_gets_awq_and_half():
    found = recommend(shape(SEVEN), card("T4"))
    assert settings(found)["dtype"] == "half"
    assert settings(found)["model"] == f"{SEVEN}-AWQ"
    assert found.plan.fits


def test_an_h200_needs_no_compromise():
    found = recommend(shape(SEVEN), card("H200"))
    assert settings(found).keys() == {"dtype"}


def test_a_v100_is_refused():
    with pytest.raises(SettingsError, match="does not run on a V100"):
        recommend(shape(SEVEN), card("V100"))


def test_what_fits_nowhere_is_refused_with_its_size():
    with pytest.raises(SettingsError, match="does not fit"):
        recommend(shape("Qwen2.5-72B-Instruct"), Place("a small card", 4 * GIB, 0, (8, 9)))


def test_a_large_model_is_spread_over_cards():
    found = recommend(shape("Qwen2.5-72B-Instruct"), card("RTX 4090"))
    assert int(settings(found)["tensor_parallel_size"]) >= 4


def test_cards_that_are_not_there_are_not_advised():
    with pytest.raises(SettingsError, match=r"The weights take 61\.0 GiB in this form, and 18\.0"):
        recommend(shape("Qwen2.5-32B-Instruct"), Place("T4", 15 * GIB, 0, (7, 5)))


def test_the_requests_that_are_promised_fit_into_the_cache():
    found = recommend(shape("Qwen2.5-32B-Instruct"), card("RTX 4090"))
    reason = next(a.reason for a in found.advice if a.setting == "max_model_len")
    promised = int(re.search(r"(\d+) requests", reason)[1])
    assert promised * found.choices.max_model_len <= found.plan.kv_tokens


def test_a_cpu_whose_memory_holds_four_bits_only_gets_them_where_they_stay_packed():
    place = Place("a laptop", 12 * GIB)
    found = recommend(shape(SEVEN), place)
    assert settings(found)["model"] == f"{SEVEN}-AWQ" and found.plan.fits
    assert found.plan.kv_tokens >= 2048
    with pytest.raises(SettingsError, match=r"14\.2 GiB in this form\."):
        recommend(shape(SEVEN), replace(place, four_bits=False))


def test_a_card_that_others_use_gets_a_smaller_share():
    place = Place("RTX 4090", 24 * GIB, 10 * GIB, (8, 9))
    found = recommend(shape("Qwen2.5-3B-Instruct"), place)
    assert found.choices.gpu_memory_utilization < 0.6
    assert "10.0 GiB" in next(a.reason for a in found.advice if a.setting.startswith("gpu_memory"))


def test_every_recommendation_fits():
    fitting = 0
    for name, gpu in product(published(), shapes.cards()):
        try:
            found = recommend(shape(name), card(gpu))
        except SettingsError:
            continue
        assert found.plan.fits, (name, gpu)
        fitting += 1
    modern = len(shapes.cards()) - 1  # without the V100
    assert fitting >= 0.9 * modern * len(published())


# ---- names and the command line -------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("A100-80GB", "A100-80"),
        ("h200", "H200"),
    ],
)
def test_a_card_is_found_however_it_is_spelt(spelt, name):
    assert shapes.card(spelt).name == name


def test_an_unknown_card_is_refused_with_those_there_are():
    with pytest.raises(SettingsError) as refused:
        shapes.card("RTX 9999")
    assert "'RTX 4090'" in str(refused.value)


def test_a_shape_is_found_by_name_and_in_a_folder():
    assert shapes.find("Qwen/Qwen2.5-7B-Instruct") == shape(SEVEN)
    assert shapes.find("tiny").vocabulary == 4096
    with pytest.raises(WeightsError):
        shapes.find("nowhere")


def labkit_plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "labkit.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_a_plan():
    done = labkit_plan(SEVEN, "--gpu", "RTX 4090")
    assert done.returncode == 0
    for part in ("weights", "KV cache", "57,344 bytes", "Recommended:", "dtype = bfloat16"):
        assert part in done.stdout, part


def test_the_command_prints_plain_numbers():
    found = json.loads(labkit_plan(SEVEN, "--gpu", "T4", "--json").stdout)
    assert found["kv_bytes_per_token"] == 57_344 and isinstance(found["kv_tokens"], int)
    assert {"dtype", "model"} <= {advice["setting"] for advice in found["advice"]}


def test_the_command_refuses_in_a_sentence():
    done = labkit_plan(SEVEN, "--gpu", "V100")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not run on a V100" in done.stdout + done.stderr


# ---- against the real engine ----------------------------------------------------------------


@pytest.mark.skipif(labkit.look().accelerator == "gpu", reason="sizes are for the CPU build")
@pytest.mark.parametrize(
    ("name", "cache", "block", "length"),
    [
        ("tiny", 8 * MIB, 32, 512),
        ("tiny", 30 * MIB, 128, 1024),
        ("tiny-awq", 16 * MIB, 128, 2048),
    ],
)
def test_a_cache_of_a_given_size_holds_what_was_predicted(name, cache, block, length):
    checkpoint = labkit.find(name)
    choices = Choices(max_model_len=length, kv_cache_memory_bytes=cache, block_size=block)
    found = plan(Shape.of(checkpoint.config, name), Place.here(), choices)
    with labkit.Engine(
        name, max_model_len=length, kv_cache_memory_bytes=cache, block_size=block
    ) as engine:
        assert engine.kv_cache_tokens == found.kv_tokens


@pytest.mark.skipif(labkit.look().accelerator == "gpu", reason="sizes are for the CPU build")
@pytest.mark.parametrize(
    ("setting", "choice"),
    [
        ({"kv_cache_dtype": "fp8"}, {"kv_bits": 8}),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 2}),
    ],
)
def test_eight_bits_and_two_ranks_double_the_tokens(setting, choice):
    if "tensor_parallel_size" in setting and hardware.look().cpus < 2:
        pytest.skip("two ranks take two processors")
    from vllm import SamplingParams

    size = {"max_model_len": 512, "kv_cache_memory_bytes": 12 * MIB}
    plain = plan(shapes.find("tiny"), Place.here(), Choices(**size))
    found = plan(shapes.find("tiny"), Place.here(), Choices(**size, **choice))
    with labkit.Engine("tiny", **size, **setting) as engine:
        assert engine.kv_cache_tokens == found.kv_tokens == 2 * plain.kv_tokens
        params = SamplingParams(temperature=0, max_tokens=40)
        question = [{"role": "user", "content": "What is AWQ?"}]
        [said] = engine.llm.chat(question, params, use_tqdm=False)
        assert "4 bits" in said.outputs[0].text
    assert hardware.THREADS_BIND not in os.environ


@pytest.mark.skipif(labkit.look().accelerator == "gpu", reason="sizes are for the CPU build")
@pytest.mark.parametrize("blocks", [8, 9])
def test_one_block_is_vllms_own(blocks):
    cache = blocks * 128 * labkit.find("tiny").kv_bytes_per_token
    choices = Choices(max_model_len=1024, kv_cache_memory_bytes=cache)
    found = plan(shapes.find("tiny"), Place.here(), choices)
    engine = labkit.Engine("tiny", max_model_len=1024, kv_cache_memory_bytes=cache)
    if found.fits:
        engine.start().stop()
    else:
        with pytest.raises(labkit.LabError, match=f"max_model_len={found.longest_that_fits}"):
            engine.start()
    assert found.fits is (blocks == 9)


@pytest.mark.skipif(labkit.look().accelerator == "gpu", reason="sizes are for the CPU build")
@pytest.mark.parametrize(
    ("name", "gigabytes", "length"),
    [("tiny", 1.5, 512), ("tiny-awq", 2.0, 1024), ("tiny", 2.5, 2048)],
)
def test_a_share_of_the_memory_holds_what_was_predicted_within_a_twentieth(name, gigabytes, length):
    share = gigabytes * 1e9 / hardware.node_bytes()
    choices = Choices(max_model_len=length, gpu_memory_utilization=share)
    found = plan(Shape.of(labkit.find(name).config, name), Place.here(), choices)
    with labkit.Engine(name, max_model_len=length, gpu_memory_utilization=share) as engine:
        assert engine.kv_cache_tokens == pytest.approx(found.kv_tokens, rel=0.05)


@pytest.mark.skipif(labkit.look().accelerator == "gpu", reason="sizes are for the CPU build")
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct-AWQ"])
def test_a_share_for_a_twin_too_although_its_output_layer_is_held_thrice(name, tmp_path):
    from vllm import SamplingParams

    share = (shape(name).weight_bytes() + 3e9) / hardware.node_bytes()
    choices = Choices(max_model_len=1024, gpu_memory_utilization=share)
    found = plan(shape(name), Place.here(), choices)
    path = twin.make(name, tmp_path / name)
    four = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with labkit.Engine(str(path), max_model_len=1024, gpu_memory_utilization=share) as engine:
        assert engine.kv_cache_tokens == pytest.approx(found.kv_tokens, rel=0.05)
        [made] = engine.llm.generate(["What is AWQ?"], four, use_tqdm=False)
        assert len(made.outputs[0].token_ids) == 4


def test_the_memory_of_a_node_is_what_vllm_takes_its_share_of():
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    node = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    assert hardware.node_bytes() == pytest.approx(node.total_memory, rel=0.02)


def test_here_is_this_machine():
    here = Place.here()
    assert here.total_bytes == hardware.look().ram_bytes or here.on_gpu


def test_the_default_share_is_vllms():
    from vllm.config import CacheConfig

    assert CacheConfig().gpu_memory_utilization == memory.UTILIZATION
