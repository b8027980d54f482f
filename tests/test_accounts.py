"""Accounts: the article's three forms are read, and weak ones never face a network."""

import pytest

from labkit import accounts
from labkit.errors import ChatError

STRONG = ("zhangsan", "blue-kettle-42")


def test_the_three_forms_come_out_as_gradio_takes_them():
    assert accounts.check(None, "127.0.0.1") is None
    assert accounts.check(("ann", "123456"), "127.0.0.1") == [("ann", "123456")]
    assert accounts.check([("ann", "a"), ["bob", "b"]], "localhost") == [("ann", "a"), ("bob", "b")]
    assert accounts.check(str.__eq__, "::1") is str.__eq__


@pytest.mark.parametrize(
    "wrong", [(), [], "ann", ("ann",), ("ann", ""), [("ann", 1)], {"ann": "b"}]
)
def test_what_is_no_account_is_refused_with_the_forms(wrong):
    with pytest.raises(ChatError, match="cannot be read") as caught:
        accounts.check(wrong, "127.0.0.1")
    assert '("user", "password")' in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "lab.example.org"])
def test_an_open_bind_without_accounts_is_refused(host):
    with pytest.raises(ChatError, match="without accounts") as caught:
        accounts.check(None, host)
    assert "accounts=(user, password)" in caught.value.next


@pytest.mark.parametrize(
    ("password", "weakness"),
    [
        ("123456", "tried first"),
        ("Password123", "tried first"),
        ("k3!xQ-9", "7 characters"),
        ("zhangsan-lisi", "the user name"),
    ],
)
def test_a_weak_password_on_an_open_bind_is_refused_and_not_repeated(password, weakness):
    user = "zhangsan-lisi" if weakness == "the user name" else "zhangsan"
    with pytest.raises(ChatError, match=f"password of '{user}'") as caught:
        accounts.check([STRONG, (user, password)], "0.0.0.0")
    assert weakness in caught.value.why
    if password != user:
        assert password not in str(caught.value)


def test_strong_accounts_and_functions_may_face_a_network():
    assert accounts.check(STRONG, "0.0.0.0") == [STRONG]
    assert callable(accounts.check(lambda user, password: False, "0.0.0.0"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("127.1.2.3", True)]
    + [("0.0.0.0", False), ("", False), ("10.0.0.1", False), ("example.org", False)],
)
def test_loopback_is_known(host, loopback):
    assert accounts.is_loopback(host) is loopback
