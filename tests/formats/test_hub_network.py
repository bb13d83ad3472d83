"""Whether the hub can be reached is known within seconds."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from learnkv.formats import hub_network
from learnkv.formats.hub_network import hub_fault


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    hub_network._connection_fault.cache_clear()
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub_network, "CONNECT_SECONDS", 0.3)
    yield
    hub_network._connection_fault.cache_clear()


def test_a_refused_connection_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub_fault() is None
    hub_network._connection_fault.cache_clear()
    assert "127.0.0.1 cannot be reached" in hub_fault()


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_: ended.wait(30))
    begun = time.monotonic()
    assert hub_fault() == "huggingface.co cannot be reached (no answer)"
    assert time.monotonic() - begun < 5
    ended.set()


def test_the_proxy_is_tried_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_fault() is None


def test_offline_needs_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "create_connection", None)
    assert hub_fault() == "HF_HUB_OFFLINE is set"
