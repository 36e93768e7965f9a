"""Checking an address before Ray connects to it: nothing there, another service, a cluster without a token."""

import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cxrscale.cluster import ray_session
from cxrscale.types import UserError


@pytest.fixture
def web_server() -> Iterator[http.server.ThreadingHTTPServer]:
    """A service that is not Ray's."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def message_of(address: str) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        ray_session.reach(address)
    assert time.monotonic() - start < 30  # ray.init would retry for minutes
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "ray://127.0.0.1:1", "nowhere.invalid:6379"])
def test_an_address_without_a_cluster_is_one_line_within_seconds(address: str) -> None:
    message = message_of(address)
    assert message.startswith(f"no Ray cluster answers at {address}: ")
    assert message.endswith("; check RAY_ADDRESS, start one, or use --local")


@pytest.mark.parametrize(
    "address", ["head", "http://127.0.0.1:8265", ":6379", "10.0.0.1:", "10.0.0.1:port", "ray://10.0.0.1"]
)
def test_a_malformed_address_is_one_line(address: str) -> None:
    assert message_of(address) == (
        f"{address!r} is not an address of a Ray cluster; give host:port, e.g. 10.0.0.1:6379"
    )


def test_an_impossible_port_is_one_line() -> None:
    assert message_of("127.0.0.1:99999").startswith("no Ray cluster answers at 127.0.0.1:99999: ")


def test_another_service_at_the_port_is_one_line(web_server: http.server.ThreadingHTTPServer) -> None:
    address = f"127.0.0.1:{web_server.server_port}"
    assert message_of(address).startswith(f"the service at {address} is not Ray's control service; give its port")


def test_a_password_in_an_address_is_not_repeated() -> None:
    assert "secret" not in message_of("ray://me:secret@10.0.0.1:10001") + message_of("me:secret@10.0.0.1:6379")


def test_a_cluster_without_a_token_is_joined_only_when_asked_for(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # A proxy for web pages stands in no way.
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    ray_session.reach(ray_cluster.address)
    for mode in ("", "token"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        message = message_of(ray_cluster.address)
        assert message.startswith(f"the cluster at {ray_cluster.address} runs without a token: whoever reaches it can")
