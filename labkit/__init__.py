"""labkit: the helper package of the vLLM lab kit.

Everything a notebook needs is importable from here. Names are resolved on first use, so
`import labkit` itself loads neither torch nor vllm nor gradio.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "hardware": ("Gpu", "Machine", "look"),
    "weights": ("Checkpoint", "find"),
    "settings": ("EngineSettings",),
    "engine": ("Engine",),
    "server": ("Server", "attach"),
    "launcher": ("launch",),
    "chat": ("Chat", "Sampling"),
    "tools": ("Tool", "Toolbox"),
    "toolchat": ("ToolChat",),
    "webchat": ("WebChat",),
    "errors": ("LabError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    value = getattr(import_module(f"labkit.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
