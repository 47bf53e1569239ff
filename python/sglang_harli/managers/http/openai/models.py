"""``DELETE /v1/models/{model}``: deletes the model that a job has made, or unloads an operator's
adapter.  Whatever else is asked of ``/v1/models`` is SGLang's."""

from __future__ import annotations

from fastapi import APIRouter
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from sglang_harli.errors import SHOWN, NotFoundError, NotReadyError
from sglang_harli.managers.http.openai import schemas
from sglang_harli.managers.http.openai.body import query
from sglang_harli.managers.http.openai.endpoint import MODELS, Api, answer, route_path
from sglang_harli.managers.http.openai.errors import Refusal
from sglang_harli.names import looks_like_adapter
from sglang_harli.protocol.calls.fine_tuning import ModelArgs, ModelDeletion

MAX_NAME = 1024
DELETE_S = 60.0


class ModelDeleted(Struct, kw_only=True):
    """The answer: the model is served no more."""

    id: str
    object: str = "model"
    deleted: bool = True


def add(router: APIRouter, api: Api) -> None:
    """Add the route to a guarded router."""

    async def delete_model(request: Request) -> Response:
        """Delete a fine-tuned model; requests that it answers are finished."""
        query(request, None)
        name = route_path(request.scope)[len(MODELS) :]  # Starlette's parameter ends at a line break
        if api.models.is_base(name):
            raise Refusal(
                f"{name!r} is the base model that this server serves: only a fine-tuned model can be deleted",
                param="model",
                code="unsupported",
            )
        deletion = await _delete(api, name)
        for other in deletion.also if deletion is not None else ():
            await _unload(api, other, deleted=True)
        if (deletion is None or deletion.again) and not api.models.is_loaded(name):
            gone = "was deleted before" if deletion is not None else "does not exist"
            raise NotFoundError(
                f"The model {name[:SHOWN]!r} {gone}: GET /v1/models lists those that exist",
                param="model",
                code="model_not_found",
            )
        await _unload(api, name, deleted=deletion is not None)
        return answer(ModelDeleted(id=name))

    described = schemas.route("deleteModel", "Models", "DELETE", ModelDeleted, ids=("model",))
    router.add_api_route("/v1/models/{model:path}", delete_model, **described)


async def _unload(api: Api, name: str, *, deleted: bool) -> None:
    if wrong := await api.models.unload(name, deleted=deleted):
        raise Refusal(wrong, param="model", code="model_in_use")


async def _delete(api: Api, name: str) -> ModelDeletion | None:
    """Have the service delete the model, durably; None: no job has made it."""
    if not name.isprintable() or len(name) > MAX_NAME:
        return None
    try:
        return await api.calls.call("model_delete", ModelArgs(model=name), ModelDeletion, timeout_s=DELETE_S)
    except NotFoundError:
        return None
    except NotReadyError:
        if looks_like_adapter(name) or not api.models.is_loaded(name):
            raise
        return None  # an operator's: the service has nothing to say about it
