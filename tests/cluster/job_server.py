"""A job server of Ray's protocol that misbehaves as asked."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "session"}


class FakeJobServer:
    """Runs one job, `job`, whose status and log are attributes; so are the faults."""

    def __init__(self) -> None:
        self.mode = "token"
        """Who may submit: token or disabled."""
        self.log = "one\ntwo\nthree\n"
        self.seconds = 0.0
        """How long the job runs after it was submitted or first asked for."""
        self.end: dict[str, Any] = {"status": "SUCCEEDED", "driver_exit_code": 0, "message": "Job finished"}
        self.pending = False
        self.refusal: tuple[int, str] | None = None
        """Status and text with which jobs are refused."""
        self.stream = "works"
        """works, refused, html, cut (after each line) or silent."""
        self.info_failures: list[tuple[int, str]] = []
        """Answers in place of the next statuses."""
        self.log_lost = False
        self.asked: list[str] = []
        self.submitted: list[dict[str, Any]] = []
        self.streams = 0
        self.stopped = False
        self.authorization: list[str | None] = []
        self.address = ""
        self._began: float | None = None

    def info(self) -> dict[str, Any]:
        """The job's public information."""
        self._began = self._began or time.monotonic()
        shared = {"type": "SUBMISSION", "submission_id": "job", "entrypoint": "python", "driver_node_id": "n1"}
        if self.stopped:
            return shared | {"status": "STOPPED", "message": "Job was intentionally stopped."}
        if time.monotonic() - self._began < self.seconds:
            status = "PENDING" if self.pending else "RUNNING"
            return shared | {"status": status, "message": "Job has not started yet." if self.pending else "running"}
        return shared | self.end

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/api/")
        self.asked.append(f"{request.method} {path}")
        self.authorization.append(request.headers.get("Authorization"))
        if path == "authentication_mode":
            return web.json_response({"authentication_mode": self.mode})
        if path == "version":
            return web.json_response(VERSION)
        if path.startswith("packages/"):
            return web.Response(status=200)
        if path == "jobs/":
            if self.refusal is not None:
                return web.Response(status=self.refusal[0], text=self.refusal[1])
            self.submitted.append(await request.json())
            return web.json_response({"job_id": "job", "submission_id": "job"})
        match = re.fullmatch(r"jobs/([^/]*)(/.*)?", path)
        if match is None or match[1] != "job":
            return web.Response(status=404, text=f"Job {match[1] if match else ''} does not exist")
        return await self._answer_job(request, match[2] or "")

    async def _answer_job(self, request: web.Request, page: str) -> web.StreamResponse:
        if page == "/stop":
            self.stopped = True
            return web.json_response({"stopped": True})
        if page == "/logs/tail":
            return await self._stream_log(request)
        if page == "/logs":
            return web.Response(status=500, text="gone") if self.log_lost else web.json_response({"logs": self.log})
        if self.info_failures:
            status, text = self.info_failures.pop(0)
            return web.Response(status=status, text=text)
        return web.json_response(self.info())

    async def _stream_log(self, request: web.Request) -> web.StreamResponse:
        self.streams += 1
        if self.stream == "refused":
            return web.Response(status=403, text="no web sockets here")
        if self.stream == "html":
            return web.Response(text="<html>sign in</html>", content_type="text/html")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.stream == "cut":
            await socket.send_str("".join(self.log.splitlines(keepends=True)[: self.streams]))
            assert request.transport is not None
            request.transport.abort()
            return socket
        if self.stream == "works":
            await socket.send_str(self.log)
        while self.info()["status"] in ("RUNNING", "PENDING") or self.stream == "silent":
            await asyncio.sleep(0.05)
        await socket.close()
        return socket

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, it answers at `address`."""
        loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
            started.set()
            await self._ended.wait()
            await runner.cleanup()

        async def main() -> None:
            self._ended = asyncio.Event()
            await serve()

        thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
        thread.start()
        assert started.wait(20)
        try:
            yield
        finally:
            loop.call_soon_threadsafe(self._ended.set)
            thread.join(20)
            loop.close()


def as_json(server: FakeJobServer) -> str:
    """What was submitted, to look for what must not be in it."""
    return json.dumps(server.submitted)
