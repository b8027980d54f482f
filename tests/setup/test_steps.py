"""One line a step, and of a failed one the reason and what to do."""

import os

import pytest
import steps


def run(script: str) -> None:
    steps.run_step("a step", ["/bin/sh", "-c", script], dict(os.environ))


def test_a_step_is_one_line(capsys):
    run("echo noise; echo more noise >&2")
    out = capsys.readouterr().out
    assert out.split() == ["a", "step", "0", "s"] and out.count("\n") == 1


def test_a_failed_step_shows_its_last_words():
    with pytest.raises(steps.Failed) as failure:
        run("seq 20; echo the reason >&2; exit 7")
    text = str(failure.value)
    assert text.startswith("Set-up stopped at: a step.\nWhy:  ")
    assert "the reason\nNext: " in text and "\n      20\n" in text and " 5\n" not in text


def test_a_step_that_says_nothing_shows_its_status():
    with pytest.raises(steps.Failed, match="exit status 7"):
        run("exit 7")


def test_a_killed_step_speaks_of_memory():
    with pytest.raises(steps.Failed, match="out of memory"):
        run("kill -9 $$")


# What pip, venv and uv really said.
@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (
            "The virtual environment was not created successfully because ensurepip is not\n"
            "available.  On Debian/Ubuntu systems, you need to install the python3-venv package",
            "apt-get install python3-venv",
        ),
        ("error: failed to write: No space left on device (os error 28)", "UV_CACHE_DIR"),
        ("OSError: [Errno 13] Permission denied: '/srv/lab/.venv'", "without sudo"),
        (
            "cause: error sending request for url (https://download.pytorch.org/whl/cpu/torch/)\n"
            "cause: dns error",
            "UV_FIND_LINKS=wheelhouse",
        ),
        (
            "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
            "'NewConnectionError('Failed to establish a new connection')'\n"
            "ERROR: No matching distribution found for uv==0.13.9",
            "UV_FIND_LINKS=wheelhouse",
        ),
        ("ERROR: No matching distribution found for uv==0.13.9", "PYTHON=python3.12"),
        ("error: No solution found when resolving dependencies", "PYTHON=python3.12"),
        ("invalid peer certificate: UnknownIssuer", "SSL_CERT_FILE"),
        ("something else", "make clean"),
    ],
)
def test_advice_fits_the_message(message, advice):
    assert advice in steps.advice_for(message)


def test_the_cause_of_a_broken_connection_is_shown():
    said = [
        "WARNING: Location 'file:///mirror/uv/' is ignored: it is not a directory.",
        "WARNING: Retrying (Retry(total=1)) after connection broken by 'ProxyError(1)': /simple/uv",
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProxyError(0)': /simple/uv",
        "ERROR: No matching distribution found for uv==0.13.9",
    ]
    text = str(steps.failure_of("uv", 1, said))
    assert "ProxyError(0)" in text and "ProxyError(1)" not in text and "Location" not in text
