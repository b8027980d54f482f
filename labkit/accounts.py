"""Who may use the chat: the accounts a learner gives, checked before a port opens."""

import ipaddress
from collections.abc import Callable, Sequence

from labkit.errors import ChatError

Account = tuple[str, str]
Accounts = Account | Sequence[Account] | Callable[[str, str], bool] | None

SHORTEST_PASSWORD = 10
# What is tried first against an open port, of any length; compared without case.
USUAL_SUSPECTS = """
123456 1234567 12345678 123456789 1234567890 0123456789 0987654321 1111111111 0000000000
1q2w3e4r5t 1qaz2wsx3edc abc123 abc1234567 admin admin12345 adminadmin administrator changeme
changeme123 iloveyou iloveyou123 letmein letmein123 password password1 password12 password123
password1234 passw0rd123 qwerty qwerty1234 qwerty12345 qwertyuiop root root123456 secret
secretsecret welcome welcome123 welcome1234 your_password your_secure_password
"""


def check(accounts: Accounts, host: str) -> list[Account] | Callable[[str, str], bool] | None:
    """The accounts in the form that Gradio's `auth` takes; None on loopback means no login.

    Raises ChatError where they cannot be read as accounts, and where `host` is not loopback
    and they are missing or too easy to guess. What a function accepts cannot be checked.
    """
    if accounts is not None and not callable(accounts):
        accounts = _pairs(accounts)
    if not is_loopback(host):
        _refuse_weak(accounts, host)
    return accounts


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _pairs(accounts: Account | Sequence[Account]) -> list[Account]:
    pairs = [accounts] if _is_pair(accounts) else accounts
    if isinstance(pairs, (list, tuple)) and pairs and all(map(_is_pair, pairs)):
        return [(user.strip(), password) for user, password in pairs]
    raise ChatError(
        "The accounts of the chat cannot be read.",
        "An account is a user name and a password, two texts that are not empty.",
        'Pass accounts=("user", "password"), a list of such pairs, or a function that '
        "takes a user name and a password and returns True or False.",
    )


def _is_pair(account: object) -> bool:
    return (
        isinstance(account, (list, tuple))
        and len(account) == 2
        and all(isinstance(part, str) and part.strip() for part in account)
    )


def _refuse_weak(accounts: list[Account] | Callable[[str, str], bool] | None, host: str) -> None:
    advice = (
        f"Pass accounts=(user, password) with {SHORTEST_PASSWORD} characters or more (Python's "
        "secrets.token_urlsafe(12) makes a good password), or leave out `host` so that the chat "
        "stays on this machine."
    )
    if accounts is None:
        raise ChatError(
            f"The chat will not listen on {host} without accounts.",
            "Everybody who can reach this machine could use the model, and its computing time.",
            advice,
        )
    for user, password in [] if callable(accounts) else accounts:
        if weakness := _weakness(user, password):
            raise ChatError(
                f"The chat will not listen on {host} with the password of {user!r}.",
                f"It {weakness}, so it is soon guessed by anybody who can reach this machine.",
                advice,
            )


def _weakness(user: str, password: str) -> str:
    if password.casefold() in USUAL_SUSPECTS.split():
        return "is among the passwords that are tried first"
    if len(password) < SHORTEST_PASSWORD:
        return f"has {len(password)} characters, fewer than {SHORTEST_PASSWORD}"
    if password.casefold() == user.casefold():
        return "is the user name"
    return ""
