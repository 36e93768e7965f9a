"""What a request holds: the model that it names, and its files, one as body or several as a form; in memory alone."""

from __future__ import annotations

from email.message import Message
from typing import TYPE_CHECKING, Annotated

from fastapi import Query
from python_multipart.exceptions import MultipartParseError
from starlette.formparsers import MultiPartException, MultiPartParser

from cxrscale.config import Serve
from cxrscale.inference.serve.problems import ProblemError
from cxrscale.inference.serve.served_model import ServedModel
from cxrscale.inference.serve.service import Service, Upload

if TYPE_CHECKING:
    from starlette.requests import Request

FORM = "multipart/form-data"
RAW = frozenset({"", "application/octet-stream", "application/dicom", "image/png", "image/jpeg"})
"""Types of a body that is one file; what it is, its first bytes say."""
ZIP = frozenset({"application/zip", "application/x-zip-compressed"})
MODEL_HEADER = "serve_multiplexed_model_id"
"""By which Ray Serve sends a request to a replica that has the model in memory."""
ModelName = Annotated[str | None, Query(description="One of /v1/models; without it the first.")]


class _InMemory(MultiPartParser):
    """Starlette's parser, which otherwise puts files of more than 1 MB on the disk."""

    spool_max_size = 1 << 62


async def read_uploads(request: Request, settings: Serve) -> list[Upload]:
    """The files of a request.

    Raises:
        ProblemError: there is none, there are too many, or the request is neither a file nor a form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in RAW:
        data = await request.body()
        if not data:
            raise ProblemError(422, "the request holds no file")
        return [Upload(file_name(request.headers.get("content-disposition", "")), data)]
    if kind in ZIP:
        raise ProblemError(415, "a zip is several files: unpack it, or drop it on the page, which reads it itself")
    if kind != FORM:
        raise ProblemError(415, f"{kind!r} is no file; send DICOM, PNG or JPEG, raw or as {FORM}")
    try:
        parser = _InMemory(request.headers, request.stream(), max_files=settings.max_files, max_fields=20)
        form = await parser.parse()
    except (MultiPartException, MultipartParseError) as error:
        message = str(getattr(error, "message", error))
        if "Too many files" in message:
            raise ProblemError(413, f"more than {settings.max_files} files; send fewer at once") from None
        raise ProblemError(422, "the form cannot be read") from None
    except KeyError:
        raise ProblemError(422, "the form has no boundary") from None
    try:
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        uploads = [Upload((file.filename or "")[:255], await file.read()) for file in files]
    finally:
        await form.close()
    if not uploads:
        raise ProblemError(422, "the form holds no file")
    return uploads


def chosen_model(service: Service, request: Request, name: str | None) -> ServedModel:
    """The model that a request names in its query, or in Ray Serve's header; or the default.

    Raises:
        ProblemError: there is none of that name.
    """
    name = name or request.headers.get(MODEL_HEADER)
    if name is not None and name not in service.models:
        raise ProblemError(404, f"there is no model {name!r:.80}; there are {', '.join(service.models)}")
    return service.models[name or service.default]


def file_name(disposition: str) -> str:
    """The file's name in a Content-Disposition header; empty without one."""
    if not disposition:
        return ""
    message = Message()
    message["content-disposition"] = disposition
    return (message.get_filename() or "")[:255]
