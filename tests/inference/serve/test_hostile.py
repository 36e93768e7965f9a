"""Clients that mean harm: a key, a limit or a process of its own stands before everything they send."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from cxrscale.config import Serve
from cxrscale.inference import PredictorSpec
from cxrscale.inference.serve import Service, decoding, load_served
from cxrscale.inference.serve.decoding import Decoder
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UnreadableImageError
from tests.fuzz.mutations import mutated
from tests.inference.serve import harm
from tests.inference.serve.conftest import Served, serving

KEY = "a key that is long enough"


@pytest.fixture(scope="module")
def guarded(classifier_run: str) -> Iterator[Served]:
    model = load_served("classifier", PredictorSpec((classifier_run,), maps=True), "cpu")
    settings = Serve(decode_workers=1, max_megabytes=1, requests_per_minute=60, body_seconds=1, queue=4)
    with serving(Service({"classifier": model}, settings), KEY) as running:
        yield running


def test_without_the_key_nothing_but_the_page_is_there(guarded: Served) -> None:
    with guarded.client() as client:
        for path in ("/v1/models", "/metrics", "/v1/drift", "/docs", "/openapi.json"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/predict", content=b"x").status_code == 401
        assert client.get("/").status_code == 200
        wrong = {"Authorization": f"Bearer {KEY[:-1]}"}
        assert client.get("/v1/models", headers=wrong).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_chunked_body_without_a_length_is_counted_as_it_comes(guarded: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    with guarded.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        answer = client.post("/v1/predict", content=chunks())
    assert answer.status_code == 413


def test_a_client_that_never_ends_its_request_is_left(guarded: Served) -> None:
    host, port = guarded.address.removeprefix("http://").split(":")
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000\r\n\r\nabc"
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(head.encode())
        assert b" 408 " in slow.recv(100)


def test_too_many_requests_are_told_to_wait(guarded: Served) -> None:
    with guarded.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        answers = [client.get("/v1/models") for _ in range(61)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert refused[0].headers["retry-after"] == "1"


def test_a_file_that_takes_too_long_or_breaks_its_decoder_harms_no_other(
    monkeypatch: pytest.MonkeyPatch, drawn: SyntheticPaths
) -> None:
    good = next(drawn.nih.rglob("*.png")).read_bytes()

    async def run() -> None:
        decoder = Decoder(1, 30.0)
        try:
            await decoder.warm_up()
            real = decoding._decode
            for broken, reason in ((harm.hang, "more than 0.5 s"), (harm.crash, "the decoder broke")):
                monkeypatch.setattr(decoding, "_decode", broken)
                decoder.seconds = 0.5 if broken is harm.hang else 30.0
                with pytest.raises(UnreadableImageError, match=reason):
                    await decoder.decode(good, "")
                monkeypatch.setattr(decoding, "_decode", real)
                decoder.seconds = 30.0
                assert (await decoder.decode(good, "")).image_HW.shape == (96, 96)
        finally:
            decoder.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["png", "jpeg", "dicom"])
def test_mutated_files_are_read_or_refused(served: Served, kind: str) -> None:
    answers = Counter[int]()
    with served.client() as client:
        for number in range(20):
            answers[client.post("/v1/predict", content=mutated(kind, 11, number)[1]).status_code] += 1
        assert client.get("/healthz").text == "ok"
    assert set(answers) <= {200, 413, 422}
    assert answers[422]
