"""The application: the same for one process and for Ray Serve."""

from __future__ import annotations

import html
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from cxrscale import __version__
from cxrscale.inference import dicom_objects
from cxrscale.inference.serve import dicomweb
from cxrscale.inference.serve.answers import predictions_json
from cxrscale.inference.serve.examples import EXAMPLES, example
from cxrscale.inference.serve.guard import Guard
from cxrscale.inference.serve.problems import ProblemError, problem
from cxrscale.inference.serve.results import OVERLAY, result_file
from cxrscale.inference.serve.service import BusyError, Service
from cxrscale.inference.serve.uploads import ModelName, chosen_model, read_uploads
from cxrscale.io import encode_png
from cxrscale.types import UnreadableImageError


def build_app(service: Service, page: Mapping[str, tuple[str, bytes]] | None = None, api_key: str | None = None) -> Any:
    """The ASGI application.

    Args:
        page: path -> (media type, content) of the page and its parts; None: there is no page.
        api_key: what every request must bring, but for the page and the checks of health; None: nothing.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(title="cxrscale", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_predictions(app, service)
    _add_status(app, service)
    app.include_router(dicomweb.router(service))
    for path, (kind, content) in (page or {}).items():
        _add_static(app, path, kind, content)
    app.add_exception_handler(BusyError, _busy)
    app.add_exception_handler(ProblemError, _problem)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_allowed)
    return Guard(app, service.settings, service.monitoring, api_key)


def _add_predictions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/predict", tags=["predictions"])
    async def predict(request: Request, model: ModelName = None, maps: bool = False) -> JSONResponse:
        """Probabilities and calls of one file (the request's body) or several (a form).

        A file that cannot be read has its `error`; where that is the only file, the answer is 422. `maps=true`
        adds what a page draws: heat maps and the mask as PNGs, and a thumbnail as JPEG, in base64.
        """
        served = chosen_model(service, request, model)
        answers = await service.predict(served.info.name, await read_uploads(request, service.settings))
        if len(answers) == 1 and answers[0].prediction.error:
            raise ProblemError(422, answers[0].prediction.error)
        return JSONResponse(predictions_json(served, answers, drawn=maps))

    @app.post("/v1/predict/{kind}", tags=["predictions"])
    async def predict_file(request: Request, kind: str, model: ModelName = None) -> Response:
        """One file's result as a file: overlay (PNG), dicom-seg, dicom-sr or dicom-sc.

        DICOM objects take patient and study from the file; of an empty mask there is a report instead of a
        segmentation.
        """
        if kind not in (OVERLAY, *dicom_objects.KINDS):
            raise ProblemError(
                404, f"there is no result {kind!r:.40}; there are {OVERLAY}, {', '.join(dicom_objects.KINDS)}"
            )
        served = chosen_model(service, request, model)
        uploads = await read_uploads(request, service.settings)
        if len(uploads) > 1:
            raise ProblemError(422, "one file at a time gives one result")
        (answer,) = await service.predict(served.info.name, uploads)
        if answer.prediction.error:
            raise ProblemError(422, answer.prediction.error)
        try:
            media, content = await result_file(served, answer, kind)
        except UnreadableImageError as error:
            raise ProblemError(422, str(error)) from None
        return Response(content, media_type=media)

    @app.post("/v1/image", tags=["predictions"])
    async def image(request: Request, depth: str = "8") -> Response:
        """A file's upright gray image as an 8-bit PNG, as the models see it before it is resized.

        With `depth=stored`, where the file has more than 8 bits, instead its values before the window as little-endian
        uint16, row by row; the header X-Stored-Image is JSON: height, width, slope, intercept (value = slope * level +
        intercept), the file's window (center, width and function as in DICOM), and whether it is inverted after that.
        """
        if depth not in ("8", "stored"):
            raise ProblemError(422, f"depth is {depth!r:.40}, neither 8 nor stored")
        (upload, *_) = await read_uploads(request, service.settings)
        try:
            if depth == "stored" and (stored := await service.decode_stored(upload)) is not None:
                headers = {"X-Stored-Image": json.dumps(stored.about), "Content-Encoding": "deflate"}
                return Response(stored.deflated, media_type="application/octet-stream", headers=headers)
            found = await service.decode(upload)
        except UnreadableImageError as error:
            raise ProblemError(422, str(error)) from None
        return Response(encode_png(found.image_HW), media_type="image/png")


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["models"])
    async def models() -> JSONResponse:
        """The models: findings, thresholds with their intervals, and how good they are."""
        found = [model.info.model_dump(mode="json") for model in service.models.values()]
        return JSONResponse({"models": found, "default": service.default})

    @app.get("/v1/drift", tags=["models"])
    async def drift() -> JSONResponse:
        """Whether the newest images and scores differ from those that each model was made with, and how often as many
        images of the test split, which do not, raise the same alarm."""
        found = {
            model: {
                name: {
                    "index": _finite(one.index),
                    "limit": round(one.limit, 4),
                    "images": one.count,
                    "alarm": one.alarm,
                    "false_alarms": _finite(service.monitoring.false_alarms[model].get(name)),
                }
                for name, one in statistics.items()
            }
            for model, statistics in service.monitoring.drift().items()
        }
        return JSONResponse(found)

    @app.get("/v1/examples/{name}", tags=["models"])
    async def examples(name: str) -> Response:
        """A synthetic image to try the service with."""
        if name not in EXAMPLES:
            raise ProblemError(404, f"there is no such example; there are {', '.join(EXAMPLES)}")
        return Response(example(name), media_type="image/png")

    @app.get("/healthz", tags=["status"])
    async def healthz() -> PlainTextResponse:
        """Whether the process answers."""
        return PlainTextResponse("ok")

    @app.get("/readyz", tags=["status"])
    async def readyz() -> Response:
        """Whether it takes requests."""
        return PlainTextResponse("ready") if service.ready else problem(503, "not ready yet")

    @app.get("/metrics", tags=["status"])
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.monitoring.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_documentation(app.openapi()))


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def _add_static(app: FastAPI, path: str, kind: str, content: bytes) -> None:
    @app.get(path, include_in_schema=False)
    async def static() -> Response:
        return Response(content, media_type=kind)


async def _busy(_request: Request, error: Exception) -> Response:
    return problem(503, str(error))


async def _problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return problem(error.status, error.detail)


async def _not_found(_request: Request, _error: Exception) -> Response:
    return problem(404, "there is nothing here; see /docs")


async def _not_allowed(_request: Request, _error: Exception) -> Response:
    return problem(405, "not with this method; see /docs")


def _documentation(schema: Mapping[str, Any]) -> str:
    """The operations as a page that loads nothing; the schema itself is /openapi.json."""
    rows = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            names = ", ".join(parameter["name"] for parameter in operation.get("parameters", []))
            words = (method.upper(), path, names, operation.get("description", ""))
            rows.append("<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in words) + "</tr>")
    head = "<tr><th>Method</th><th>Path</th><th>Parameters</th><th>What it does</th></tr>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>cxrscale: requests</title>'
        '<link rel="stylesheet" href="/app.css"></head><body class="docs"><h1>Requests</h1>'
        f'<table>{head}{"".join(rows)}</table><p><a href="/openapi.json">openapi.json</a></p></body></html>'
    )
