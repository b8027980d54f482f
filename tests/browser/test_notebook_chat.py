"""A learner opens 07_chat in JupyterLab, runs it, and chats in the frame."""

import os
import socket
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Frame, Locator, Page, expect

from labkit import watch

NOTEBOOK = "07_chat.ipynb"
QUESTION = "What is PagedAttention?"
CELLS_SECONDS = 400  # importing vLLM three times and loading the model, on two slow cores
REPLY_SECONDS = 60
GONE_SECONDS = 10

# Collects every text that the newest reply shows, as it grows.
RECORD = """
() => {
  window.states = [];
  const note = () => {
    const replies = document.querySelectorAll('.bot.message .prose');
    const text = replies.length ? [...replies].at(-1).innerText.trim() : '';
    if (text && text !== window.states.at(-1)) window.states.push(text);
  };
  new MutationObserver(note).observe(document.body,
    { childList: true, subtree: true, characterData: true });
}
"""


@pytest.fixture
def page(browser: Browser, jupyterlab):
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    yield context.new_page()
    context.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("LAB_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.timeout(600)
def test_chat_streams_in_the_notebook_and_ends_with_the_kernel(jupyterlab, page, screenshots):
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    jupyters_own = jupyterlab.family.alive()

    run_all_cells(page, f"{jupyterlab.url}lab/tree/{NOTEBOOK}?token={jupyterlab.token}")
    chat = inline_chat(page)
    states = ask(chat, QUESTION)
    page.locator(".jp-Cell").last.scroll_into_view_if_needed()
    show_frame(page)
    page.screenshot(path=screenshots / "chat-in-jupyterlab.png")
    expect(chat.locator(".bot.message")).to_contain_text(states[-1].split()[0])

    assert len(states) >= 3, f"the reply did not stream: {states}"
    assert all(len(state) < len(states[-1]) for state in states[:2])
    assert "Next:" not in states[-1], "the chat shows an error in place of a reply"
    outside = [url for url in requests if url.startswith("http") and "//127.0.0.1" not in url]
    assert not outside, "the lab works offline, so no page may load from the internet"

    ours = jupyterlab.family.alive() - jupyters_own
    ports = {port for process in watch.describe(ours) for port in process.ports}
    shut_down_kernels(jupyterlab)
    _, left = psutil.wait_procs(ours, timeout=GONE_SECONDS)
    assert not watch.describe(left)
    assert not [port for port in ports if listens(port)]


def run_all_cells(page: Page, address: str) -> None:
    """Open the notebook, choose Run > Run All Cells as a learner does, and wait for the end."""
    page.goto(address)
    expect(page.locator(".jp-Notebook .jp-Cell").first).to_be_visible(timeout=60_000)
    # Cells run before the kernel is connected are dropped in silence.
    expect(page.get_by_role("button", name="| Idle")).to_be_visible(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    waiting = page.get_by_text("[*]:", exact=True)
    expect(waiting.first).to_be_attached(timeout=60_000)
    expect(waiting).to_have_count(0, timeout=CELLS_SECONDS * 1000)
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert not errors.all_inner_texts()


def show_frame(page: Page) -> Locator:
    """The frame in a cell's output, scrolled into the middle of the window."""
    frame = page.locator(".jp-OutputArea-output iframe")
    frame.evaluate("frame => frame.scrollIntoView({ block: 'center' })")
    return frame


def inline_chat(page: Page) -> Frame:
    """The chat in its frame, once its page is drawn."""
    chat = show_frame(page).element_handle().content_frame()
    chat.locator("textarea").first.wait_for(timeout=60_000)
    return chat


def ask(chat: Frame, question: str) -> list[str]:
    """Send a message; returns each text that the reply showed until it was whole."""
    chat.evaluate(RECORD)
    box = chat.locator("textarea").first
    box.fill(question)
    box.press("Enter")
    expect(chat.locator(".bot.message").first).to_be_visible(timeout=REPLY_SECONDS * 1000)
    # Gradio locks the box while a reply streams.
    expect(box).to_be_enabled(timeout=REPLY_SECONDS * 1000)
    return chat.evaluate("() => window.states")


def shut_down_kernels(jupyterlab) -> None:
    for kernel in jupyterlab.api("GET", "kernels").json():
        jupyterlab.api("DELETE", f"kernels/{kernel['id']}")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
