"""Asks the bundled model through the real vLLM: `python -m labkit.tiny.evaluate`."""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.tiny import MODEL_DIR
from labkit.tiny.cases import Case, all_cases

if TYPE_CHECKING:
    from vllm import LLM

MOST_TOKENS = 1200

# What the notebooks ask; each row is one conversation in which the model's own replies stand.
COURSE = (
    ("What is PagedAttention?",), ("Why does vLLM cut the KV cache into blocks?",),
    ("What is the KV cache?",), ("What is continuous batching?",), ("What is AWQ?",),
    ("What does gpu-memory-utilization do?",), ("When should I use enforce-eager?",),
    ("What is grouped-query attention?",), ("What does max-model-len do?",),
    ("What is a token?",), ("What is streaming?",), ("What can I do when memory runs out?",),
    ("Who are you?",), ("Hello!",), ("你好！",), ("你是谁？",), ("什么是 PagedAttention？",),
    ("什么是 KV 缓存？",), ("什么是连续批处理？",), ("显存不足怎么办？",),
    ("为什么 vLLM 要把 KV 缓存切成块？",), ("广州有什么好玩的景点？", "白云山要门票吗？"),
    ("What is there to see in Paris?", "Does the Louvre cost anything?", "And the tower?"),
    ("My name is Mina.", "What is my name?"), ("Count from 1 to 50.",), ("Tell me a long story.",),
)  # fmt: skip


def start_engine(model: Path) -> "LLM":
    """The real vLLM engine, inside this process on a CPU."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    return LLM(
        model=str(model), dtype="bfloat16", enforce_eager=True, max_model_len=2048,
        kv_cache_memory_bytes=64 << 20, max_num_seqs=64, disable_log_stats=True,
    )  # fmt: skip


def ask(llm: "LLM", conversations: list[list[dict]]) -> list[tuple[str, bool, int]]:
    """Greedy replies: the text, whether the model stopped by itself, and tokens written."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MOST_TOKENS)
    outputs = llm.chat(conversations, params, use_tqdm=False)
    firsts = [output.outputs[0] for output in outputs]
    return [(o.text, o.finish_reason == "stop", len(o.token_ids)) for o in firsts]


def score(llm: "LLM", cases: list[Case]) -> tuple[dict, list[dict]]:
    """Counts by skill and language, and every wrong reply."""
    counts = defaultdict(lambda: {"cases": 0, "right": 0, "stopped": 0})
    wrong = []
    replies = ask(llm, [case.messages for case in cases])
    for case, (text, stopped, _) in zip(cases, replies, strict=True):
        row = counts[f"{case.skill} ({case.language})"]
        right = case.right(text)
        row["cases"] += 1
        row["right"] += right
        row["stopped"] += stopped
        if not right:
            wrong.append({"skill": case.skill, "messages": case.messages, "reply": text})
    return dict(counts), wrong


def course(llm: "LLM") -> list[tuple[str, str]]:
    """Question and reply of everything the course itself asks, in order."""
    answered = []
    for questions in COURSE:
        messages = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            reply = ask(llm, [messages])[0][0]
            messages.append({"role": "assistant", "content": reply})
            answered.append((question, reply))
    return answered


def print_table(counts: dict) -> None:
    """One line a skill: how many were right and how many ended by themselves."""
    print(f"{'skill':30s} {'cases':>6s} {'right':>7s} {'stopped':>8s}")
    for skill, row in counts.items():
        right, stopped = row["right"] / row["cases"], row["stopped"] / row["cases"]
        print(f"{skill:30s} {row['cases']:6d} {right:7.1%} {stopped:8.1%}")


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--cases", type=int, default=200, help="of each skill")
    parser.add_argument("--json", type=Path, help="write the counts and wrong replies there")
    parser.add_argument("--course", action="store_true", help="also print the course's prompts")
    options = parser.parse_args()
    llm = start_engine(options.model)
    if options.course:
        for question, reply in course(llm):
            print(f"> {question}\n{reply}\n")
    counts, wrong = score(llm, list(all_cases(options.cases)))
    print_table(counts)
    if options.json:
        text = json.dumps({"skills": counts, "wrong": wrong}, ensure_ascii=False, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
