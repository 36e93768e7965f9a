"""A service of two models on a real port, for the tests of this folder."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
