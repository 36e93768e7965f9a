"""The service on Ray Serve: the same answers as in one process, and a lost replica costs nobody an answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

pytest.importorskip("grpc_reflection", reason="cxrscale[serve-ray] is not installed")

import psutil

from cxrscale.config import API_KEY, Serve, ServeApplication
from cxrscale.inference import Predictor
from cxrscale.run import serving
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.servers import free_port


def test_a_service_that_is_open_to_others_needs_a_key(classifier_run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(UserError, match="set CXRSCALE_API_KEY"):
        serving.Front(ServeApplication(models={"chest": classifier_run}), None)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"args.*model_names"):
        serving.application({"models": {"a": "b"}, "model_names": []})


@pytest.fixture(scope="module")
def address(ray_cluster: None, classifier_run: str, segmenter_run: str) -> Iterator[str]:  # noqa: ARG001
    """A front, and two replicas of a service of two models, of which each has one in memory."""
    given = ServeApplication(
        models={"classifier": classifier_run, "segmenter": segmenter_run},
        device="cpu",
        limits=Serve(decode_workers=1, requests_per_minute=0),
        models_per_replica=1,
        loopback=True,
    )
    port = free_port()
    options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0}}
    with serving.running(given, "127.0.0.1", port, **options):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_answer_as_the_predictor_does(address: str, classifier_run: str, drawn: SyntheticPaths) -> None:
    pngs = sorted(drawn.nih.rglob("*.png"))[:4]
    expected = Predictor(classifier_run, "cpu").predict([str(path) for path in pngs])
    with httpx.Client(base_url=address, timeout=120) as client:
        assert [model["name"] for model in client.get("/v1/models").json()["models"]] == ["classifier", "segmenter"]
        for _ in range(3):
            for path, theirs in zip(pngs, expected, strict=True):
                answer = client.post("/v1/predict", content=path.read_bytes()).json()
                assert answer["predictions"][0]["probabilities"] == pytest.approx(dict(theirs.probabilities), abs=1e-5)
                named = {"serve_multiplexed_model_id": "segmenter"}
                other = client.post("/v1/predict", content=path.read_bytes(), headers=named).json()
                assert other["model"]["name"] == "segmenter"
        assert client.post("/v1/predict", content=b"nothing").status_code == 422


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_replica_that_is_killed_under_load_costs_nobody_an_answer(address: str, drawn: SyntheticPaths) -> None:
    image = next(drawn.nih.rglob("*.png")).read_bytes()
    outcomes, stop = Counter[str](), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=120) as client:
            while not stop.is_set():
                try:
                    outcomes[str(client.post("/v1/predict", content=image).status_code)] += 1
                except httpx.HTTPError as error:
                    outcomes[type(error).__name__] += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: outcomes["200"] > 20)
    commands = {one.pid: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
    replicas = [pid for pid, command in commands.items() if "ServeReplica:cxrscale:cxrscale" in command]
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    before = outcomes["200"]
    until(lambda: outcomes["200"] > before + 50)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {"200"}


def until(true: Callable[[], bool]) -> None:
    """Wait for it, two minutes at most."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
