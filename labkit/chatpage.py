"""The chat page: Gradio's ChatInterface over any function that streams a reply.

It knows nothing of vLLM. `Chat.stream` fits, and so does a generator of your own:
`reply(message, history, system, sampling)`, which yields the text so far, again and again.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import TYPE_CHECKING

from labkit.chat import SYSTEM, Sampling, parse_token_ids
from labkit.errors import ChatError, LabError

if TYPE_CHECKING:
    import gradio as gr

Reply = Callable[[str, list[dict], str, Sampling], Iterator[str]]

TITLE = "Chat"
EXAMPLES = (
    "What is PagedAttention?",
    "How does continuous batching help?",
    "广州有什么好玩的景点？",
    "什么是 KV 缓存？",
)
# Gradio's default of 1 would let a class queue up behind one learner.
CONCURRENCY = 64
NO_ANSWER = "⚠️ No answer"
# The system's own fonts: nothing to load, and Chinese looks as it does elsewhere.
FONTS = ("system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")


def build(
    reply: Reply,
    *,
    title: str = TITLE,
    system: str = SYSTEM,
    sampling: Sampling | None = None,
    examples: Sequence[str] = EXAMPLES,
    concurrency: int = CONCURRENCY,
    closing: Event | None = None,
) -> "gr.ChatInterface":
    """The chat as a Gradio app, not yet launched; setting `closing` ends the replies under way.

    Raises ChatError where `reply` is no function.
    """
    if not callable(reply):
        raise ChatError(
            f"A {type(reply).__name__} cannot answer messages.",
            "The chat needs a function of message, history, system and sampling.",
            "Pass such a function, for example chat.stream (without parentheses).",
        )
    gr = _gradio()
    return gr.ChatInterface(
        _answer(reply, closing or Event()),
        title=title,
        chatbot=gr.Chatbot(
            show_label=False,
            elem_classes="conversation",
            buttons=["copy", "copy_all"],
            placeholder="Write a message below, or start with one of these.",
        ),
        textbox=gr.Textbox(
            placeholder="Your message; Enter sends it", submit_btn=True, stop_btn=True, scale=7
        ),
        additional_inputs=_controls(system, sampling or Sampling()),
        additional_inputs_accordion=gr.Accordion(
            "Settings: system prompt and sampling", open=False, elem_classes="settings"
        ),
        examples=[[example] for example in examples],
        editable=True,
        fill_width=True,
        fill_height=False,
        concurrency_limit=concurrency,
        api_name="chat",
        api_visibility="undocumented",
        analytics_enabled=False,
    )


def _controls(system: str, sampling: Sampling) -> list:
    """The inputs of the settings panel, in the order in which `_answer` takes them."""
    gr = _gradio()
    token_ids = ", ".join(map(str, sampling.stop_token_ids))
    return [
        gr.Textbox(system, label="System prompt", lines=1, max_lines=3),
        gr.Slider(0, 2, sampling.temperature, step=0.05, label="temperature"),
        gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="top_p"),
        gr.Number(sampling.max_tokens, minimum=1, precision=0, label="max_tokens"),
        gr.Slider(0.5, 2, sampling.repetition_penalty, step=0.05, label="repetition_penalty"),
        gr.Textbox(token_ids, label="stop_token_ids", placeholder="such as 151645, 151643"),
    ]


def _answer(reply: Reply, closing: Event) -> Callable[..., Iterator]:
    """`reply` as Gradio calls it: one argument per control, and its troubles as messages."""

    def answer(
        message, history, system, temperature, top_p, max_tokens, repetition_penalty, token_ids
    ):
        text = ""
        try:
            sampling = Sampling(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                repetition_penalty=repetition_penalty,
                stop_token_ids=parse_token_ids(token_ids or ""),
            )
            with contextlib.closing(
                _pieces(reply, message, answered(history), system, sampling)
            ) as pieces:
                for text in pieces:
                    yield text
                    if closing.is_set():
                        return
        except _expected() as error:
            yield [text, apology(error)] if text else apology(error)

    return answer


def _pieces(reply: Reply, *request) -> Iterator[str]:
    # `yield from` hands the stop button's close() on to the reply, so that it ends too.
    answer = reply(*request)
    yield from [answer] if isinstance(answer, str) else answer


def answered(history: Sequence[dict]) -> list[dict]:
    """The history without our own error boxes, and without the questions that got nothing else."""
    kept: list[dict] = []
    for message in history:
        if (message.get("metadata") or {}).get("title") != NO_ANSWER:
            kept.append(message)
        elif kept and kept[-1]["role"] == "user":
            kept.pop()
    return kept


def apology(error: Exception) -> dict:
    """The message of the chat that says why no (further) answer came."""
    text = str(_explained(error))
    return {"role": "assistant", "content": text, "metadata": {"title": NO_ANSWER}}


def _expected() -> tuple[type[Exception], ...]:
    """What a reply may raise through no fault in its code; anything else is a bug to be seen."""
    import httpx
    import openai

    # A server that dies in mid-stream raises httpx's errors, not the SDK's.
    return LabError, openai.OpenAIError, httpx.HTTPError, OSError


def _explained(error: Exception) -> LabError:
    import openai

    if isinstance(error, LabError):
        return error
    if isinstance(error, openai.APIStatusError):
        return ChatError(
            f"The model server refused this request ({error.status_code}).",
            error.message,
            "Change the message or the settings, or start a new conversation.",
        )
    return ChatError(
        "The model server does not answer, or it broke off.",
        f"{type(error).__name__}: {error}",
        "See whether it is still running; once it is, send the message again.",
    )


def _gradio():
    """Gradio, imported with its reports to its makers switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def theme() -> "gr.Theme":
    """The look of the page beyond its style sheet; Gradio 6 takes it at launch."""
    default = _gradio().themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        spacing_size="sm",
        font=FONTS,
        font_mono=MONO_FONTS,
    )
    return default.set(
        block_title_background_fill="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_weight="500",
    )
