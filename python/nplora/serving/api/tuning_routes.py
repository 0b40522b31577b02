"""The routes for files and fine-tuning jobs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

from nplora.formats.errors import brief
from nplora.serving.api.bodies import Body
from nplora.serving.api.protocols import TuningJobs
from nplora.serving.api.service import Service
from nplora.serving.fields import Fields
from nplora.serving.request_error import RequestError

_METADATA = re.compile(r"metadata\[(.{1,64})\]")


def jobs_of(service: Service) -> TuningJobs:
    if service.jobs is None:
        raise RequestError(
            "this server accepts no files and no fine-tuning jobs: start it with --jobs DIR",
            404,
            code="not_enabled",
        )
    return service.jobs


async def create_file(service: Service, request: Any) -> Any:
    """POST /v1/files, a form with the fields `file` and `purpose`."""
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    jobs = jobs_of(service)
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise RequestError("the body is not a form: send multipart/form-data", 415, code="invalid_form")
    try:
        form = await request.form(max_files=1, max_fields=16)
    except (HTTPException, UnicodeDecodeError, ValueError, KeyError) as error:
        raise RequestError(
            f"the form cannot be read: {getattr(error, 'detail', error)}", code="invalid_form"
        ) from error
    try:
        file, purpose = form.get("file"), form.get("purpose", "fine-tune")
        if not isinstance(file, UploadFile):
            raise RequestError("file is missing", param="file", code="missing_required_parameter")
        if not isinstance(purpose, str):
            raise RequestError("purpose is a file, expected a text", param="purpose", code="invalid_value")
        name = (file.filename or "").replace("\\", "/").rpartition("/")[2] or "upload.jsonl"
        return await asyncio.to_thread(jobs.create_file, file.file, name, purpose)
    finally:
        await form.close()


def files(service: Service, query: Mapping[str, str]) -> Any:
    """GET /v1/files"""
    return jobs_of(service).files(**_chosen(query, "purpose", "after", "limit", "order"))


def open_content(service: Service, file_id: str) -> BinaryIO:
    """GET /v1/files/{id}/content"""
    try:
        return jobs_of(service).file_content(file_id).open("rb")
    except FileNotFoundError as error:
        message = f"the content of the file {brief(file_id)} is missing: it may just have been deleted"
        raise RequestError(message, 404, "file_id", "file_not_found") from error


async def create_job(service: Service, body: Body) -> Any:
    """POST /v1/fine_tuning/jobs"""
    jobs = jobs_of(service)
    fields = Fields(await body.json())
    return await asyncio.to_thread(jobs.create_job, fields.values)


def jobs(service: Service, query: Mapping[str, str]) -> Any:
    """GET /v1/fine_tuning/jobs"""
    metadata = {found[1]: value for name, value in query.items() if (found := _METADATA.fullmatch(name))}
    return jobs_of(service).jobs(**_chosen(query, "after", "limit"), metadata=metadata or None)


def events(service: Service, query: Mapping[str, str], id_: str) -> Any:
    """GET /v1/fine_tuning/jobs/{id}/events"""
    return jobs_of(service).events(id_, **_chosen(query, "after", "limit"))


def checkpoints(service: Service, query: Mapping[str, str], id_: str) -> Any:
    """GET /v1/fine_tuning/jobs/{id}/checkpoints"""
    return jobs_of(service).checkpoints(id_, **_chosen(query, "after", "limit"))


def _chosen(query: Mapping[str, str], *names: str) -> dict[str, Any]:
    """Return the query's parameters whose names are in `names`. Only `limit` is converted to an integer."""
    found: dict[str, Any] = {name: query[name] for name in names if name in query}
    text = found.get("limit")
    if text is not None and text.isascii() and text.isdecimal() and len(text) < 10:
        found["limit"] = int(text)
    return found
