"""pip's mirrors and wheelhouses reach uv, and what is set for uv itself wins."""

import os
import platform
import sys

import pytest
import sources

TAG = "cp311"


def torch_wheel(folder, version="2.13.0+cpu", tag=TAG):
    (folder / f"torch-{version}-{tag}-{tag}-linux_{platform.machine()}.whl").touch()
    return str(folder)


@pytest.mark.parametrize(
    ("uv", "pip", "links"),
    [
        ("", "", []),
        ("", "/a", ["/a"]),
        ("", "/a /b", ["/a", "/b"]),
        ("", "/a\nhttps://example.org/wheels", ["/a", "https://example.org/wheels"]),
        ("/c,/d", "/a", ["/c", "/d"]),
        ("/c, /d", "", ["/c", "/d"]),
    ],
)
def test_wheelhouses_are_split(uv, pip, links):
    assert sources.find_links({"UV_FIND_LINKS": uv}, {"find-links": pip}) == links


def test_a_folder_with_a_space_is_one_wheelhouse(tmp_path):
    folder = tmp_path / "my wheels"
    folder.mkdir()
    links = {"UV_FIND_LINKS": str(folder)}
    assert sources.find_links(links, {}) == [str(folder)]
    # pip cuts its list of links at spaces.
    assert sources.tool_environment(links, {})["PIP_FIND_LINKS"] == f"file://{tmp_path}/my%20wheels"


def test_a_wheelhouse_serves_torch_where_it_has_it(tmp_path):
    assert sources.torch_flags([torch_wheel(tmp_path)], "2.13.0+cpu", TAG) == []
    assert sources.torch_flags([f"file://{tmp_path}"], "2.13.0+cpu", TAG) == []


@pytest.mark.parametrize(("version", "tag"), [("2.12.0+cpu", TAG), ("2.13.0+cpu", "cp312")])
def test_pytorchs_index_serves_it_where_the_wheelhouse_has_another(tmp_path, version, tag):
    flags = sources.torch_flags([torch_wheel(tmp_path, version, tag)], "2.13.0+cpu", TAG)
    assert flags == ["--torch-backend=cpu"]


def test_pytorchs_index_serves_it_where_no_wheelhouse_is_named():
    assert sources.torch_flags([], "2.13.0+cpu", TAG) == ["--torch-backend=cpu"]


def test_an_address_of_links_is_believed_to_have_it():
    assert sources.torch_flags(["https://example.org/wheels"], "2.13.0+cpu", TAG) == []


def test_pips_settings_become_uvs():
    pip = {
        "index-url": "https://mirror.example/simple",
        "extra-index-url": "https://one.example/simple\nhttps://two.example/simple",
        "find-links": "/wheels",
        "cert": "/etc/campus.pem",
    }
    environ = sources.tool_environment({}, pip)
    assert environ["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert environ["UV_INDEX"] == "https://one.example/simple https://two.example/simple"
    assert environ["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert environ["UV_FIND_LINKS"] == environ["PIP_FIND_LINKS"] == "/wheels"
    assert environ["SSL_CERT_FILE"] == "/etc/campus.pem"


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_what_is_set_for_uv_wins(name):
    environ = sources.tool_environment({name: "mine"}, {"index-url": "pips"})
    assert environ[name] == "mine" and "pips" not in environ.values()


def test_a_place_elsewhere_is_not_installed_into():
    environ = sources.tool_environment({"PIP_TARGET": "/x", "PIP_USER": "1", "HOME": "/h"}, {})
    assert environ == {"HOME": "/h", "PIP_USER": "0"}


@pytest.mark.parametrize(
    ("environ", "pip", "forbidden"),
    [
        ({}, {}, False),
        ({"UV_OFFLINE": "0"}, {}, False),
        ({"UV_OFFLINE": "1"}, {}, True),
        ({"UV_NO_INDEX": "true"}, {}, True),
        ({}, {"no-index": "1"}, True),
    ],
)
def test_the_classroom_without_internet_is_recognised(environ, pip, forbidden):
    assert sources.index_forbidden(environ, pip) is forbidden
    assert ("PIP_NO_INDEX" in sources.tool_environment(environ, pip)) is forbidden


def test_pips_own_settings_are_read(tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/simple\nfind-links = /file\n")
    variables = {name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
    variables |= {"PIP_CONFIG_FILE": str(config), "PIP_FIND_LINKS": "/variable"}
    settings = sources.pip_settings(sys.executable, variables)
    assert settings["index-url"] == "https://mirror.example/simple"
    assert settings["find-links"] == "/variable"
