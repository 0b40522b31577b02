"""The routes for models and adapters, as OpenAI's API, vLLM and llama.cpp define them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from nplora.runtime.error_text import message_of
from nplora.serving.api.bodies import Body
from nplora.serving.api.models import inside
from nplora.serving.api.service import Service
from nplora.serving.fields import Fields, checked_text
from nplora.serving.request_error import RequestError


def models(service: Service) -> dict[str, Any]:
    """GET /v1/models"""
    return {"object": "list", "data": service.models.cards(_limits(service))}


def model(service: Service, name: str) -> dict[str, Any]:
    """GET /v1/models/{name}"""
    return service.models.card(name, _limits(service))


def _limits(service: Service) -> dict[str, int]:
    """The most tokens of a prompt plus its answer, and, if there is such a limit, the most of an answer."""
    limits = {"max_model_len": service.engine.context}
    return limits if service.most_tokens is None else limits | {"max_tokens": service.most_tokens}


def delete_model(service: Service, name: str) -> dict[str, Any]:
    """DELETE /v1/models/{name}

    An adapter that a fine-tuning job has made can be deleted even if it is not loaded.
    """
    if name == service.models.name:
        raise RequestError("the base model cannot be deleted", param="model")
    unknown = None
    try:
        service.models.unload(name)
    except RequestError as error:
        unknown = error
    is_deleted = service.jobs is not None and service.jobs.delete_model(name)
    if unknown is not None and not is_deleted:
        raise unknown
    return {"id": name, "object": "model", "deleted": True}


async def load(service: Service, body: Body) -> str:
    """POST /v1/load_lora_adapter, with `lora_name`, `lora_path` and optionally `load_inplace`."""
    fields = Fields(await body.json())
    fields.require_known({"lora_name", "lora_path", "load_inplace"}, {"base_model_name": ()})
    name = checked_text("lora_name", fields.required("lora_name"))
    path = checked_text("lora_path", fields.required("lora_path"), empty=False)
    if service.adapter_dir is None:
        raise RequestError(
            "adapters can be loaded only if the server was started with --adapter-dir",
            403,
            code="not_enabled",
        )
    found = inside(service.adapter_dir, path)
    try:
        await asyncio.to_thread(service.models.load, name, found, fields.boolean("load_inplace"))
    except (OSError, ValueError) as error:
        message = message_of(error).replace(f"{service.adapter_dir.resolve()}{os.sep}", "")
        raise RequestError(f"the adapter cannot be loaded: {message}", param="lora_path") from error
    return f"Success: LoRA adapter '{name}' added successfully."


async def unload(service: Service, body: Body) -> str:
    """POST /v1/unload_lora_adapter, with `lora_name`."""
    fields = Fields(await body.json())
    fields.require_known({"lora_name", "lora_int_id"}, {})
    name = checked_text("lora_name", fields.required("lora_name"))
    await asyncio.to_thread(service.models.unload, name)
    return f"Success: LoRA adapter '{name}' removed successfully."


def scales(service: Service) -> list[dict[str, Any]]:
    """GET /lora-adapters"""
    return service.models.scales()


async def set_scales(service: Service, body: Body) -> dict[str, Any]:
    """POST /lora-adapters, with a list of {"id": ..., "scale": ...}."""
    given = await body.json()
    await asyncio.to_thread(service.models.set_scales, given)
    return {"success": True}
