"""A service of two models on a real port, for the tests of this folder."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="cxrscale[serve] is not installed")

import uvicorn

from cxrscale.config import Serve
from cxrscale.inference import PredictorSpec
from cxrscale.inference.serve import Service, build_app, load_served
from cxrscale.reporting import serve_page
from cxrscale.run import Run
from tests.servers import free_port


@dataclass(frozen=True, slots=True)
class Served:
    """A running service."""

    address: str
    service: Service

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, **options)  # type: ignore[arg-type]


@contextmanager
def serving(service: Service, api_key: str | None = None) -> Iterator[Served]:
    """Inside, the service answers."""
    port = free_port()
    app = build_app(service, serve_page.page_files(), api_key)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if not thread.is_alive():
                raise AssertionError("the service ended")
            try:
                if httpx.get(f"{address}/readyz").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        yield Served(address, service)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="package")
def served(classifier_run: str, segmenter_run: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A classifier with thresholds, the default, and a segmenter."""
    copy = str(shutil.copytree(classifier_run, tmp_path_factory.mktemp("served") / "classifier"))
    Run(copy).choose_thresholds(resamples=4)
    models = {
        name: load_served(name, PredictorSpec((run,), maps=True), "cpu")
        for name, run in (("classifier", copy), ("segmenter", segmenter_run))
    }
    settings = Serve(decode_workers=1, decode_seconds=5, max_megabytes=3, max_files=20, drift_window=100)
    with serving(Service(models, settings)) as running:
        yield running


@pytest.fixture(scope="package")
def variants(served: Served) -> Iterator[Served]:
    """One classifier under two names."""
    run = served.service.models["classifier"].predictor.provenance.run
    models = {name: load_served(name, PredictorSpec((run,), maps=True), "cpu") for name in "ab"}
    with serving(Service(models, Serve(decode_workers=1))) as running:
        yield running


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    from tests.inference.serve.browsing import CHROMIUM, FLAGS, sync_api

    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page, whose console and requests are watched."""
    shown = browser.new_page(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    errors: list[str] = []
    requests: list[str] = []
    shown.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(served.address)
    shown.wait_for_selector("body[data-ready]")
    yield shown
    shown.close()
    # A file that cannot be read is answered with 422, which Chromium itself writes into the console.
    assert [error for error in errors if "422" not in error] == []
    assert [
        url for url in requests if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"))
    ] == []
