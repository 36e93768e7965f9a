"""The requests of the service, to a real server: the predictor's own answers, and an error for each way to be wrong."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest

from cxrscale.config import Serve
from cxrscale.inference import Prediction, Predictor, PredictorSpec
from cxrscale.inference.serve import Service, load_served
from cxrscale.io import encode_png, load_image, rle_masks
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.dicom_files import dicom_file, gray_image
from tests.inference.serve.conftest import Served, serving


@pytest.fixture(scope="module")
def pngs(drawn: SyntheticPaths) -> list[Path]:
    return sorted(drawn.nih.rglob("*.png"))[:8]


@pytest.fixture(scope="module")
def dicoms(drawn: SyntheticPaths) -> list[Path]:
    return sorted(drawn.siim.rglob("*.dcm"))[:4]


def form(paths: list[Path]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (path.name, path.read_bytes())) for path in paths]


@pytest.fixture(scope="module")
def expected(served: Served, pngs: list[Path]) -> list[Prediction]:
    """What the classifier says of the images."""
    run = served.service.models["classifier"].predictor.provenance.run
    return Predictor(run, "cpu").predict([str(path) for path in pngs])


def test_the_answer_is_what_the_predictor_says(served: Served, expected: list[Prediction], pngs: list[Path]) -> None:
    with served.client() as client:
        answer = client.post("/v1/predict", files=form(pngs)).json()
    assert answer["model"]["name"] == "classifier"
    assert [one["name"] for one in answer["predictions"]] == [path.name for path in pngs]
    for one, theirs in zip(answer["predictions"], expected, strict=True):
        assert one["probabilities"] == pytest.approx(dict(theirs.probabilities), abs=1e-5)
        assert one.get("calls", {}) == theirs.calls


def test_a_file_may_be_the_body_and_maps_and_masks_are_drawn(served: Served, dicoms: list[Path]) -> None:
    name = {"Content-Disposition": 'attachment; filename="x.dcm"', "Content-Type": "application/dicom"}
    with served.client() as client:
        query = {"model": "segmenter", "maps": "true"}
        answer = client.post("/v1/predict", params=query, content=dicoms[0].read_bytes(), headers=name)
    (one,) = answer.json()["predictions"]
    assert one["name"] == "x.dcm"
    image_HW = load_image(dicoms[0].read_bytes()).image_HW
    mask_HW = load_image(base64.b64decode(one["mask_png"])).image_HW
    assert mask_HW.shape == image_HW.shape
    assert np.array_equal(mask_HW > 0, rle_masks.decode(one["mask_rle"], image_HW.shape))
    assert list(one["maps"]) == ["Pneumothorax"]
    assert load_image(base64.b64decode(one["thumbnail_jpeg"])).image_HW.shape == (96, 96)


def test_many_clients_at_once_each_get_their_own_answer(served: Served, classifier_run: str, pngs: list[Path]) -> None:
    expected = Predictor(classifier_run, "cpu").predict([str(path) for path in pngs])

    def ask(number: int) -> dict[str, float]:
        with served.client() as client:
            answer = client.post("/v1/predict", content=pngs[number % len(pngs)].read_bytes())
        assert answer.status_code == 200
        probabilities: dict[str, float] = answer.json()["predictions"][0]["probabilities"]
        return probabilities

    with ThreadPoolExecutor(16) as pool:
        for number, found in enumerate(pool.map(ask, range(48))):
            assert found == pytest.approx(dict(expected[number % len(pngs)].probabilities), abs=1e-5)


def test_results_come_as_files(served: Served, dicoms: list[Path]) -> None:
    source = pydicom.dcmread(dicoms[0])
    with served.client() as client:
        report = client.post("/v1/predict/dicom-sr", content=dicoms[0].read_bytes())
        overlay = client.post("/v1/predict/overlay", content=dicoms[0].read_bytes())
        refused = client.post("/v1/predict/dicom-seg", content=dicoms[0].read_bytes())
        gray = client.post("/v1/image", content=dicoms[0].read_bytes())
    made = pydicom.dcmread(io.BytesIO(report.content))
    assert (made.Modality, made.StudyInstanceUID) == ("SR", source.StudyInstanceUID)
    assert overlay.content.startswith(b"\x89PNG")
    assert refused.status_code == 422
    assert "makes no dicom-seg" in refused.json()["detail"]
    assert np.array_equal(load_image(gray.content).image_HW, load_image(dicoms[0].read_bytes()).image_HW)


def test_an_image_of_more_than_8_bits_comes_before_its_window(served: Served, pngs: list[Path]) -> None:
    values = gray_image(60, 50, dtype="i2", bits=12)
    tags: dict[str, Any] = {"BitsStored": 12, "RescaleIntercept": -5, "WindowCenter": 40, "WindowWidth": 400}
    with served.client() as client:
        deep = client.post("/v1/image?depth=stored", content=dicom_file(values, **tags))
        shallow = client.post("/v1/image?depth=stored", content=pngs[0].read_bytes())
        bad = client.post("/v1/image?depth=stored", content=pngs[0].read_bytes()[:200])
        wrong = client.post("/v1/image?depth=12", content=pngs[0].read_bytes())
    about = json.loads(deep.headers["x-stored-image"])
    assert about["window"] == {"center": 40, "width": 400, "function": "LINEAR"}
    levels_HW = np.frombuffer(deep.content, "<u2").reshape(about["height"], about["width"])
    assert np.array_equal(about["slope"] * levels_HW.astype(int) + about["intercept"], values - 5)
    assert shallow.headers["content-type"] == "image/png"
    assert (bad.status_code, wrong.status_code) == (422, 422)
    assert "neither 8 nor stored" in wrong.json()["detail"]


def test_one_bad_file_of_several_has_its_reason_and_alone_it_is_422(served: Served, pngs: list[Path]) -> None:
    bad = ("files", ("bad.png", pngs[0].read_bytes()[:200]))
    with served.client() as client:
        several = client.post("/v1/predict", files=[bad, *form(pngs[1:2])])
        alone = client.post("/v1/predict", content=bad[1][1])
    assert several.status_code == 200
    first, second = several.json()["predictions"]
    assert "error" in first
    assert "probabilities" in second
    assert alone.status_code == 422
    assert alone.headers["content-type"] == "application/problem+json"
    assert alone.json()["detail"] == first["error"]


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/v1/predict", {"content": b""}, 422),
        ("/v1/predict", {"content": b"<a/>", "headers": {"Content-Type": "text/xml"}}, 415),
        ("/v1/predict", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422),
        ("/v1/predict", {"content": b"PK", "headers": {"Content-Type": "application/zip"}}, 415),
        ("/v1/predict?model=none", {"content": b"x"}, 404),
        ("/v1/predict/dicom-xx", {"content": b"x"}, 404),
        ("/v1/nothing", {"content": b"x"}, 404),
        ("/v1/predict", {"content": b"x" * 3_100_000}, 413),
        ("/v1/predict", {"files": [("f", (f"{n}.png", b"x")) for n in range(21)]}, 413),
        ("/studies", {"content": b"x"}, 415),
    ],
)
def test_a_wrong_request_is_a_problem_of_one_line(
    served: Served, path: str, options: dict[str, object], status: int
) -> None:
    with served.client() as client:
        answer = client.post(path, **options)  # type: ignore[arg-type]
    assert answer.status_code == status
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail"}
    assert "/tmp" not in problem["detail"]


def test_models_say_how_good_they_are_and_where_their_thresholds_lie(served: Served) -> None:
    with served.client() as client:
        answer = client.get("/v1/models").json()
    assert answer["default"] == "classifier"
    assert [one["task"] for one in answer["models"]] == ["classify", "segment"]
    assert list(answer["models"][0]["findings"]) == ["Cardiomegaly", "Effusion", "Mass", "Hernia"]
    classifier = answer["models"][0]
    assert classifier["trained_on"] == ["nih"]
    assert classifier["form"] == "float"
    assert date.fromisoformat(classifier["trained"]) <= datetime.now(UTC).date()
    assert classifier["ood_limit"] > 0
    for name, found in classifier["findings"].items():
        assert 0 <= found["prevalence"] < 1, name


def test_metrics_count_requests_and_images(served: Served, pngs: list[Path]) -> None:
    with served.client() as client:
        client.post("/v1/predict", content=pngs[0].read_bytes())
        text = client.get("/metrics").text
    assert 'cxrscale_requests_total{path="/v1/predict",status="200"}' in text
    assert 'cxrscale_images_total{outcome="predicted"}' in text
    assert pngs[0].stem not in text


def test_brighter_images_raise_the_alarm(served: Served, drawn: SyntheticPaths) -> None:
    images = [load_image(path.read_bytes()).image_HW for path in sorted(drawn.nih.rglob("*.png"))]
    brighter = [encode_png((image // 2 + 127).astype(np.uint8)) for image in images]
    with served.client() as client:
        for begin in range(0, len(brighter), 20):
            batch = [("f", (f"{n}.png", data)) for n, data in enumerate(brighter[begin : begin + 20])]
            assert client.post("/v1/predict", files=batch).status_code == 200
        found = client.get("/v1/drift").json()["classifier"]
    assert found["brightness"]["alarm"], found


def test_a_service_that_is_stopped_finishes_what_it_has_taken(classifier_run: str, pngs: list[Path]) -> None:
    model = load_served("classifier", PredictorSpec((classifier_run,), maps=True), "cpu")
    with ThreadPoolExecutor(8) as pool:
        with serving(Service({"classifier": model}, Serve(decode_workers=1))) as running:
            service = running.service

            def ask(path: Path) -> int:
                return httpx.post(f"{running.address}/v1/predict", content=path.read_bytes(), timeout=60).status_code

            asked = [pool.submit(ask, path) for path in pngs]
            # All have been taken, and most wait for the one decoder.
            while service.monitoring.waiting._value.get() + sum(one.done() for one in asked) < len(asked):
                time.sleep(0.001)
        assert {one.result() for one in asked} == {200}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.address}/healthz")


def test_the_page_and_all_it_loads_come_from_here(served: Served) -> None:
    with served.client() as client:
        page = client.get("/")
        assert "Not a medical device" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for path in ("/page/app.js", "/page/worker.js", "/app.css", "/favicon.svg", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
            assert "access-control-allow-origin" not in client.get(path).headers
        assert "http" not in client.get("/app.css").text
    assert httpx.get(f"{served.address}/healthz").text == "ok"
