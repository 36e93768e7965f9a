"""What stands before every request: key, rate, size and time of the body, headers of the answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from cxrscale.config import Serve
from cxrscale.inference.serve.monitoring import Monitoring
from cxrscale.inference.serve.problems import ProblemError, problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("cxrscale")
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/favicon.svg", "/app.css"})
OPEN_FOLDER = "/page/"
"""What needs no key: the page itself, which asks for one, and whether the service lives."""
SECURITY: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MINUTE = 60.0


def guarded(app: ASGIApp, settings: Serve, api_key: str | None) -> ASGIApp:
    """An application behind key and limits, which counts its requests itself."""
    return Guard(app, settings, None, api_key)


class Guard:
    """ASGI middleware. Whatever goes wrong inside becomes problem details without a word of the cause's location."""

    def __init__(self, app: ASGIApp, settings: Serve, monitoring: Monitoring | None, api_key: str | None) -> None:
        self._app, self._settings, self._monitoring = app, settings, monitoring
        self._key = None if api_key is None else api_key.encode()
        self._bytes_in_flight = 0
        self._rates: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        body = _Body(self, receive)
        started = False

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, body, answer)
        except ProblemError as error:
            await problem(error.status, error.detail)(scope, receive, answer)
        except Exception as error:
            # The type alone: a message may hold a path or a value of a header.
            LOG.error("a request failed: %s", type(error).__name__)
            if not started:
                await problem(500, "the service failed; its log has the kind of the error")(scope, receive, answer)
        finally:
            self._bytes_in_flight -= body.taken
            # The route's pattern, not what the client sent, which may name a study.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            if self._monitoring is not None:
                self._monitoring.requests.labels(path, str(status)).inc()
                self._monitoring.latency.labels(path).observe(time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        self._check_rate(scope)
        headers = Headers(scope=scope)
        if self._key is not None and not _is_open(scope["path"]) and not self._has_key(headers):
            raise ProblemError(401, "this service wants its key: Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_megabytes * 1e6:
            raise _too_large(self._settings)

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ").encode(errors="replace")
        return hmac.compare_digest(given, self._key or b"")

    def _check_rate(self, scope: Scope) -> None:
        """A bucket of tokens per address, filled over a minute."""
        limit = self._settings.requests_per_minute
        if not limit or _is_open(scope["path"]):
            return
        client, now = (scope.get("client") or ("", 0))[0], time.monotonic()
        if len(self._rates) > 10_000:
            self._rates = {one: (left, at) for one, (left, at) in self._rates.items() if now - at < MINUTE}
        left, at = self._rates.get(client, (float(limit), now))
        left = min(float(limit), left + (now - at) * limit / MINUTE)
        if left < 1:
            raise ProblemError(429, f"more than {limit} requests per minute; wait a moment")
        self._rates[client] = (left - 1, now)

    def take(self, taken: int, size: int) -> None:
        """Count `size` more bytes of a body that had `taken`.

        Raises:
            ProblemError: too many.
        """
        if taken + size > self._settings.max_megabytes * 1e6:
            raise _too_large(self._settings)
        if self._bytes_in_flight + size > self._settings.memory_megabytes * 1e6:
            raise ProblemError(503, "too many large requests at once; come again in a moment")
        self._bytes_in_flight += size

    @property
    def body_seconds(self) -> float:
        """How long a body may take to come."""
        return self._settings.body_seconds


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


class _Body:
    """The body of a request, counted as it comes: a chunked one has no Content-Length to check."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self.taken = 0
        self._deadline = time.monotonic() + guard.body_seconds
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the client has left
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            limit = self._guard.body_seconds
            raise ProblemError(408, f"the request was not whole after {limit:g} s") from None
        size = len(message.get("body", b""))
        self._guard.take(self.taken, size)
        self.taken += size
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def _too_large(settings: Serve) -> ProblemError:
    return ProblemError(413, f"the request is larger than {settings.max_megabytes:g} MB; send fewer files at once")
