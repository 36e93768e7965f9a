"""A proxy before the S3 server of the tests that answers as real stores sometimes do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Schedule = Callable[[str, str, int], str]
"""(HTTP method, path, number of earlier requests for the same method and path) -> a fault's name; "" for none."""

FAULTS = ("403", "404", "500", "503", "expired", "reset", "short", "slow")
_ERRORS = {
    "403": (403, "AccessDenied"),
    "404": (404, "NoSuchKey"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
}


@contextmanager
def faulty_s3(endpoint: str, schedule: Schedule) -> Iterator[str]:
    """The address of a proxy to the endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(urlsplit(endpoint).netloc, schedule))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(upstream: str, schedule: Schedule) -> type[BaseHTTPRequestHandler]:
    seen: dict[tuple[str, str], int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            with lock:
                before = seen.get((self.command, path), 0)
                seen[self.command, path] = before + 1
            fault = schedule(self.command, path, before)
            if fault == "reset":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(0.3)
            if fault in _ERRORS:
                status, code = _ERRORS[fault]
                self.answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())
                return
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            if fault == "short" and self.command == "GET" and len(content) > 1:
                content = content[: len(content) // 2]
                headers["Content-Length"] = str(len(content))
            self.answer(answer.status, headers, content)
            connection.close()

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            given = {name.lower() for name in headers}
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in given:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    return Handler
