"""What vLLM's start-up failures mean: a catalogue from its messages to advice."""

import re
from dataclasses import dataclass
from pathlib import Path

from labkit.logs import shorten


@dataclass(frozen=True)
class Fault:
    """One known failure: how vLLM words it, and what happened, why, and what to do.

    The texts may use the pattern's groups, as {0}, {1} ...
    """

    pattern: str
    what: str
    why: str
    next: str

    def match(self, text: str) -> tuple[str, str, str] | None:
        """The three sentences, when the text holds this failure."""
        found = re.search(self.pattern, text, re.DOTALL)
        if not found:
            return None
        return tuple(part.format(*found.groups()) for part in (self.what, self.why, self.next))


CATALOGUE = [
    Fault(
        r"seq len \((\d+)\).{1,400}?estimated maximum model length is (\d+)",
        "The KV cache is too small for one request of {0} tokens.",
        "At least one sequence of max_model_len must fit into the cache; {1} tokens would.",
        "Set max_model_len={1} or less, or give the cache more memory "
        "(gpu_memory_utilization, kv_cache_memory_bytes).",
    ),
    Fault(  # where vLLM estimates nothing, since hardly a block fits
        r"seq len \((\d+)\).{1,100}?larger than the available KV cache memory",
        "The KV cache is too small for one request of {0} tokens.",
        "At least one sequence of max_model_len must fit into the cache, and this one is tiny.",
        "Give the cache more memory (gpu_memory_utilization, kv_cache_memory_bytes), or lower "
        "max_model_len.",
    ),
    Fault(
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\D*(\d+)",
        "The model cannot take sequences of {0} tokens.",
        "Its config.json says it was made for {1}.",
        "Set max_model_len={1} or less.",
    ),
    Fault(
        r"Free memory on device \S* ?\(([\d.]+)/([\d.]+) GiB\)"
        r".{1,80}utilization \(([\d.]+), ([\d.]+)",
        "The GPU has too little free memory: {0} of its {1} GiB.",
        "gpu_memory_utilization={2} asks for {3} GiB, and something else holds the rest.",
        "Stop what holds it (nvidia-smi lists processes), or lower gpu_memory_utilization.",
    ),
    Fault(
        r"memory on node \d+ \(([\d.]+)/([\d.]+) GiB\) on startup"
        r".{1,80}utilization \(([\d.]+), ([\d.]+)",
        "The machine has too little free memory: {0} of the {1} GiB beside its processor.",
        "On a CPU gpu_memory_utilization is a share of the memory node, and {2} of it is {3} GiB.",
        "Lower gpu_memory_utilization, end other programs, or set kv_cache_memory_bytes instead.",
    ),
    Fault(
        r"memory on node \d+ \(([\d.]+)/([\d.]+) GiB\).{1,80}for kv \(-[\d.]+/([\d.]+) GiB\)",
        "gpu_memory_utilization leaves no memory for the KV cache.",
        "On a CPU it is a share of the memory node's {1} GiB, here {2} GiB; vLLM itself "
        "already takes more than that.",
        "Raise gpu_memory_utilization, or set kv_cache_memory_bytes instead.",
    ),
    Fault(
        r"memory on node \d+ \(([\d.]+)/([\d.]+) GiB\).{1,80}for kv \(([\d.]+)",
        "There is not enough memory for a KV cache of {2} GiB.",
        "{0} of {1} GiB are free on this memory node.",
        "Lower kv_cache_memory_bytes or gpu_memory_utilization, or end other programs.",
    ),
    Fault(
        r"Cannot find the config file for (\w+)",
        "This checkpoint is not quantized with {0}.",
        "quantization={0} does not quantize a model; it says how an already quantized one is read.",
        "Leave quantization out: vLLM reads it from the checkpoint. For less memory take the "
        "-AWQ version of the model.",
    ),
    Fault(
        r"model config \((\w+)\) does not match the quantization .{1,80}\((\w+)\)",
        "The checkpoint is quantized with {0}, not with {1}.",
        "vLLM reads the method from the checkpoint and found another one asked for.",
        "Leave quantization out.",
    ),
    Fault(
        r"attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        "The model cannot be split over {1} devices.",
        "Tensor parallelism deals the {0} attention heads out evenly.",
        "Choose a tensor_parallel_size that divides {0}.",
    ),
    Fault(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "There are not {0} GPUs here.",
        "{1} can be used.",
        "Set tensor_parallel_size={1} or less.",
    ),
    Fault(
        r"Not enough allowed NUMA nodes to bind threads of (\d+)",
        "There are not {0} processors here for {0} ranks.",
        "On a CPU each rank of a tensor parallel engine takes at least one.",
        "Lower tensor_parallel_size.",
    ),
    Fault(
        r"Bfloat16 is only supported on GPUs with compute capability",
        "This GPU cannot compute in bfloat16.",
        "That needs compute capability 8.0 (Ampere); a T4 has 7.5.",
        "Set dtype='half'.",
    ),
    Fault(
        r"no kernel image is available",
        "This vLLM has no kernels for this GPU.",
        "GPUs below compute capability 7.5, such as the V100, are no longer supported.",
        "Use a newer GPU, or the CPU build (LAB_ACCELERATOR=cpu make tour).",
    ),
    Fault(
        r"CUDA out of memory|OutOfMemoryError",
        "The GPU ran out of memory.",
        "Weights, KV cache and CUDA graphs together did not fit.",
        "Try enforce_eager=True (no graphs), a smaller max_model_len or max_num_seqs, an -AWQ "
        "model, or cpu_offload_gb.",
    ),
    Fault(
        r"Address already in use|address already in use",
        "The port is taken.",
        "Another program listens on it.",
        "Leave port out, and a free one is found.",
    ),
    Fault(
        r"InvalidCxxCompiler|No working C\+\+ compiler",
        "The model could not be compiled.",
        "enforce_eager=False compiles it, which on a CPU takes a C++ compiler.",
        "Install g++, or set enforce_eager=True.",
    ),
    Fault(
        r"Failed to infer device type",
        "vLLM found no device to run on.",
        "The CUDA build of vLLM is installed, but no GPU can be seen.",
        "Check nvidia-smi, or set the lab up again with LAB_ACCELERATOR=cpu make tour.",
    ),
    Fault(
        r"validation errors? for .{1,200}?Value error, (.+?)\.? \[type=",
        "vLLM does not accept these settings.",
        "{0}.",
        "Change them, or leave them out: vLLM has defaults that fit together.",
    ),
]

# The last error of vLLM's engine process is the cause; those after it only report that one.
ERROR = re.compile(r"^.*?\b((?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Exception)): (.+)$", re.MULTILINE)
REPORTS = ("Engine core initialization failed", "WorkerProc initialization failed")


def explain(text: str, log: Path) -> tuple[str, str, str]:
    """What happened, why, and what to do, from the text of a failed start.

    A failure that the catalogue does not know is told by its root cause.
    """
    for fault in CATALOGUE:
        sentences = fault.match(text)
        if sentences:
            return sentences
    why = root_cause(text) or "Its log does not say why."
    return "vLLM did not start.", why, f"Read the end of its log: {shorten(log)}"


def root_cause(text: str) -> str | None:
    """The last error that a log tells of and that does not merely report another one."""
    causes = [
        f"{name}: {message.strip()}"
        for name, message in ERROR.findall(text)
        if not message.startswith(REPORTS)
    ]
    return causes[-1] if causes else None
