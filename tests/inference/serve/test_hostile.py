"""Clients that mean harm: a key, a limit or a process of its own stands before everything they send."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pydicom
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_mutated_files_end_in_an_answer_each(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    answers, reasons = Counter[int](), Counter[str]()
    with served.client() as client:
        for number in range(1000):
            kind = ("png", "jpeg", "dicom")[number % 3]
            answer = client.post("/v1/predict", content=mutated(kind, 12, number)[1])
            answers[answer.status_code] += 1
            if answer.status_code == 422:
                reasons[answer.json()["detail"]] += 1
        assert client.get("/healthz").text == "ok"
    assert set(answers) <= {200, 413, 422}
    assert answers[422] > 200
    said = " ".join([*reasons, caplog.text])
    assert not any(word in said for word in ("Traceback", "/tmp", "site-packages", ".py"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_clients_at_once_are_answered_or_told_to_come_again(served: Served, drawn: SyntheticPaths) -> None:
    image = next(drawn.nih.rglob("*.png")).read_bytes()

    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.post("/v1/predict", content=image)).status_code

    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=served.address, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(ask(client) for _ in range(200)))

    answers = Counter(asyncio.run(all_of_them()))
    assert set(answers) <= {200, 503}
    assert answers[200] >= 150
    with served.client() as client:
        assert client.post("/v1/predict", content=image).status_code == 200


@pytest.mark.slow
def test_clients_that_send_a_byte_at_a_time_keep_nobody_waiting(guarded: Served, drawn: SyntheticPaths) -> None:
    host, port = guarded.address.removeprefix("http://").split(":")
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100000\r\n\r\n"
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(50)]
    for one in slow:
        one.sendall(head.encode())
    image = next(drawn.nih.rglob("*.png")).read_bytes()
    with guarded.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        began = time.monotonic()
        answer = client.post("/v1/predict", content=image)
        took = time.monotonic() - began
    for one in slow:
        one.close()
    assert answer.status_code in (200, 429)  # the address has its limit of requests
    assert took < 20


def test_nothing_of_a_request_is_written_to_the_disk_or_the_log(
    served: Served,
    drawn: SyntheticPaths,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file is written")

    for where, how in ((tempfile, "TemporaryFile"), (tempfile.SpooledTemporaryFile, "rollover")):
        monkeypatch.setattr(where, how, refuse)
    path = next(drawn.siim.rglob("*.dcm"))
    patient = str(pydicom.dcmread(path).PatientID)
    files = [("files", ("Doe^Jane.dcm", path.read_bytes())), ("files", ("Doe^John.png", b"x" * 2_000_000))]
    with served.client() as client:
        answers = client.post("/v1/predict", files=files).json()["predictions"]
        metrics = client.get("/metrics").text
    assert ["error" in one for one in answers] == [False, True]
    said = caplog.text + metrics + "".join(capfd.readouterr())
    assert not any(word in said for word in ("Doe", "Jane", "John", patient))
