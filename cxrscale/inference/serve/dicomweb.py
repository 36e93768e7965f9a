"""STOW-RS (PS3.18 10.5): a PACS or a router sends instances, and gets segmentations or reports back.

Nothing is stored. The answer is either the standard's list of what was taken (application/dicom+json), or, where the
client accepts multipart/related; type="application/dicom", the objects that were made.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from cxrscale.config import Serve
from cxrscale.inference import dicom_objects
from cxrscale.inference.serve.problems import ProblemError
from cxrscale.inference.serve.results import DICOM, result_file
from cxrscale.inference.serve.service import Answer, Service, Upload
from cxrscale.inference.serve.uploads import ModelName, chosen_model
from cxrscale.io import dicom
from cxrscale.types import UnreadableImageError

CANNOT_UNDERSTAND = 0xC000
"""Failure reason (PS3.18 table I.2-2)."""


def router(service: Service) -> APIRouter:
    """The requests of DICOMweb."""
    made = APIRouter(tags=["DICOMweb"])

    async def store(
        request: Request,
        model: ModelName = None,
        kind: Annotated[str | None, Query(description="dicom-seg, dicom-sr or dicom-sc.")] = None,
    ) -> Response:
        """Instances in, SEG or SR objects in their studies out."""
        served = chosen_model(service, request, model)
        wanted = kind or (dicom_objects.SEG if served.info.task == "segment" else dicom_objects.SR)
        if wanted not in dicom_objects.KINDS:
            raise ProblemError(404, f"there is no such result; there are {', '.join(dicom_objects.KINDS)}")
        uploads = await read_instances(request, service.settings)
        answers = await service.predict(served.info.name, uploads)
        results: list[bytes] = []
        failed: list[Answer] = []
        for answer in answers:
            try:
                if answer.prediction.error:
                    raise UnreadableImageError(answer.prediction.error)
                results.append((await result_file(served, answer, wanted))[1])
            except UnreadableImageError:
                failed.append(answer)
        status = 409 if not results else 202 if failed else 200
        if results and DICOM in request.headers.get("accept", "").replace("dicom+json", ""):
            return _related(results, status)
        taken = [answer for answer in answers if answer not in failed]
        return Response(json.dumps(_stored(taken, failed)), status, media_type="application/dicom+json")

    made.add_api_route("/studies", store, methods=["POST"])
    made.add_api_route("/studies/{study}", store, methods=["POST"])
    return made


async def read_instances(request: Request, settings: Serve) -> list[Upload]:
    """The instances of a STOW-RS request.

    Raises:
        ProblemError: it is not multipart/related, or its parts cannot be told apart.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/related" or b"boundary" not in options:
        raise ProblemError(415, 'send multipart/related; type="application/dicom"')
    parts: list[bytearray] = []

    def begin() -> None:
        if len(parts) >= settings.max_files:
            raise ProblemError(413, f"more than {settings.max_files} instances; send fewer at once")
        parts.append(bytearray())

    def data(chunk: bytes, start: int, end: int) -> None:
        parts[-1] += chunk[start:end]

    try:
        parser = MultipartParser(options[b"boundary"], {"on_part_begin": begin, "on_part_data": data})
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except FormParserError:
        raise ProblemError(422, "the parts of the request cannot be told apart") from None
    if not parts:
        raise ProblemError(422, "the request holds no instance")
    return [Upload(f"instance-{number}.dcm", bytes(part)) for number, part in enumerate(parts, start=1)]


def _stored(taken: Sequence[Answer], failed: Sequence[Answer]) -> dict[str, Any]:
    """The Store Instances Response (PS3.18 10.5.3.1)."""
    response: dict[str, Any] = {}
    if taken:
        response["00081199"] = {"vr": "SQ", "Value": [_reference(answer) for answer in taken]}
    if failed:
        reason = {"00081197": {"vr": "US", "Value": [CANNOT_UNDERSTAND]}}
        response["00081198"] = {"vr": "SQ", "Value": [_reference(answer) | reason for answer in failed]}
    return response


def _reference(answer: Answer) -> dict[str, Any]:
    """Class and instance of what the client sent, as far as it can be read."""
    try:
        tags = dicom.read_tags(answer.upload.data)
    except UnreadableImageError:
        return {}
    names = {"00081150": "SOPClassUID", "00081155": "SOPInstanceUID"}
    uids = {tag: str(getattr(tags, name, "")) for tag, name in names.items()}
    return {tag: {"vr": "UI", "Value": [uid]} for tag, uid in uids.items() if uid}


def _related(results: Sequence[bytes], status: int) -> Response:
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
    content = b"".join(head + result + b"\r\n" for result in results) + f"--{boundary}--\r\n".encode()
    return Response(content, status, media_type=f'multipart/related; type="{DICOM}"; boundary={boundary}')
