"""Requests that are answered by the application in another process: passed there whole, and once more where it dies.

Nothing that a request asks for changes anything, so that it may be asked twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers

from cxrscale.inference.serve.problems import problem
from cxrscale.inference.serve.service import BusyError
from cxrscale.inference.serve.uploads import MODEL_HEADER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Request = tuple[dict[str, Any], bytes]
"""What is sent of a request: a part of its ASGI scope, and its body."""
Answered = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""
KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
"""Of an ASGI scope; the rest are objects of the server."""


class Forwarder:
    """ASGI application without routes: everything is answered elsewhere."""

    def __init__(self, ask: Callable[[Request, str], Awaitable[Answered]]) -> None:
        """Args:
        ask: gets a request and the name of the model that it is for, '' for the default. It may raise BusyError.
        """
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request = {name: scope[name] for name in KEPT if name in scope}
        request["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        try:
            status, headers, content = await self._ask((request, bytes(body)), model_of(scope))
        except BusyError as error:
            await problem(503, str(error))(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def model_of(scope: Scope) -> str:
    """The model that a request names in its query or its header; '' where it names none."""
    named = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model")
    if named:
        return str(named[0])
    return str(Headers(raw=scope["headers"]).get(MODEL_HEADER, ""))


async def answer(app: ASGIApp, request: Request) -> Answered:
    """What an application answers to a request that came from elsewhere."""
    scope, body = request
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, content = 500, list[tuple[bytes, bytes]](), bytearray()

    async def receive() -> Message:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], [(bytes(name), bytes(value)) for name, value in message["headers"]]
        else:
            content.extend(message.get("body", b""))

    await app(dict(scope), receive, send)
    return status, headers, bytes(content)


async def _live(receive: Receive, send: Send) -> None:
    """A server's own start and end, of which there is nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
