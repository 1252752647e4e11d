"""Every error of the API as problem+json (RFC 9457): what happened, to which thing, what to do next."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from heliostat.errors import HeliostatError, InternalError, InvalidRequest, NotFound, NotHonoured, Unauthenticated
from heliostat.models.clouds import Provider
from heliostat.models.common import did_you_mean, new_id
from heliostat.models.compute_configs import NOT_SUPPORTED
from heliostat.models.jobs import NOT_SUPPORTED_JOB
from heliostat.models.services import NOT_SUPPORTED_SERVICE, ServiceDeploy

log = structlog.get_logger(__name__)


def install(app: FastAPI) -> None:
    app.add_exception_handler(HeliostatError, _heliostat)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unhandled)


def problem(error: HeliostatError, status: int | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    body = error.to_problem()
    if status is not None:
        body["status"] = status
    if isinstance(error, Unauthenticated):
        headers = {"www-authenticate": "Bearer", **(headers or {})}
    return JSONResponse(body, status_code=body["status"], headers=headers, media_type="application/problem+json")


async def _heliostat(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HeliostatError)
    if error.status >= 500:
        log.warning("refused", code=error.code, path=request.url.path, why=error.message, resource=error.resource)
    return problem(error)


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, HeliostatError):  # FastAPI hides what reading a body raises behind a 400
        return problem(error.__cause__)
    if error.status_code == 404:
        return problem(NotFound("There is no such route.", remedy="/docs lists the routes."))
    wrong = InvalidRequest(f"{error.detail}.", remedy="/docs lists the routes and their methods.")
    return problem(wrong, error.status_code, dict(error.headers or {}))


async def _unhandled(request: Request, error: Exception) -> JSONResponse:
    id = new_id("err")
    log.error("unhandled", error_id=id, method=request.method, path=request.url.path, exc_info=error)
    return problem(
        InternalError(
            "Something went wrong that we did not foresee.",
            remedy=f"Tell the operator the id {id}: the API's log has the reason under it.",
            resource=id,
        )
    )


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    endpoint = getattr(request.scope.get("route"), "endpoint", None)
    body = get_type_hints(endpoint).get("body") if endpoint else None
    return problem(explain(list(error.errors()), body))


def explain(errors: list[dict[str, Any]], body: Any = None) -> HeliostatError:
    """Pydantic's findings as one error of ours. It names the first field and lists the others; a known option
    that we do not carry out says so. Never repeats what was sent: it may hold secrets. ``body``: the type that the
    body should have had, for the name that was meant."""
    errors = _of_the_meant_union_member(errors)
    for found in errors:
        if found["type"] == "extra_forbidden" and (reason := _not_honoured(found["loc"], body)):
            field = _dotted(found["loc"])
            return NotHonoured(
                f"{field!r} is not honoured here: {reason}.", remedy=f"Leave out {field!r}.", field=field
            )
    first = errors[0]
    field, what = _dotted(first["loc"]), _what(first)
    details = {"errors": [{"field": _dotted(e["loc"]), "problem": _what(e)} for e in errors]} if errors[1:] else None
    if first["type"] == "json_invalid":
        return InvalidRequest("The body is not JSON.", remedy="Send valid JSON.")
    if not field:
        return InvalidRequest(f"The body is refused: {what}.", remedy="/docs shows its shape.", details=details)
    remedy = f"Correct {field!r}."
    if first["type"] == "extra_forbidden":
        known = _fields(body, first["loc"][1:-1])
        remedy = did_you_mean(str(first["loc"][-1]), known) if known else f"Leave out {field!r}."
    return InvalidRequest(f"{field!r}: {what}.", remedy=remedy, field=field, details=details)


def _fields(annotation: Any, path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model that stands at ``path`` below ``annotation``; empty if none does."""
    tagged = [m for m in get_args(annotation) if path and _tag(m) == path[0]]
    model = _model(tagged[0] if tagged else annotation)
    for part in path:
        if model is not None and part in model.model_fields:  # else an index, or a label of the union's
            model = _model(model.model_fields[part].annotation)
    return list(model.model_fields) if model is not None else []


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model(a)) is not None), None)


def _tag(annotation: Any) -> Any:
    """By which a member of ``CloudCreate`` is told from the others, and which pydantic puts into an error's place."""
    field = annotation.model_fields.get("provider") if hasattr(annotation, "model_fields") else None
    return next(iter(get_args(field.annotation)), None) if field is not None else None


def _what(found: dict[str, Any]) -> str:
    if found["type"] == "extra_forbidden":
        return "there is no such field"
    if found["type"] == "missing":
        return "it is required"
    return str(found["msg"]).removeprefix("Value error, ").rstrip(".")


def _dotted(loc: tuple[Any, ...]) -> str:
    rest = loc[2:] if len(loc) > 2 and loc[1] in tuple(Provider) else loc[1:]  # see _tag: no field is called so
    return ".".join(str(p) for p in rest if p != "str" and not _is_object_member(p))


def _not_honoured(loc: tuple[Any, ...], body: Any) -> str | None:
    name = str(loc[-1])
    if _model(body) is ServiceDeploy and "compute_config" not in loc[:-1]:
        return NOT_SUPPORTED_SERVICE.get(name)
    if "required_resources" in loc[:-1]:
        return NOT_SUPPORTED["PhysicalResources"].get(name)
    if any(p in ("head_node", "worker_nodes") for p in loc):
        only = NOT_SUPPORTED["WorkerNodeGroupConfig"] if "worker_nodes" in loc else {}
        return only.get(name) or NOT_SUPPORTED["NodeConfig"].get(name)
    if any(p in ("compute_config", "config") for p in loc[:-1]):
        return NOT_SUPPORTED["ComputeConfig"].get(name)
    return NOT_SUPPORTED_JOB.get(name)


def _of_the_meant_union_member(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``compute_config`` is a name or an object: of an object, "is not a string" helps nobody."""
    inside = [e for e in errors if any(_is_object_member(p) for p in e["loc"])]
    if not inside:
        return errors
    if any(_is_object_member(e["loc"][-1]) and e["type"] in ("model_type", "model_attributes_type") for e in inside):
        whole = inside[0]["loc"]
        at = whole[: next(i for i, p in enumerate(whole) if _is_object_member(p))]
        what = {"loc": at, "type": "shape", "msg": "give a name, name:version, an id, or an object"}
        return [what, *(e for e in errors if e["loc"][: len(at)] != at)]
    return [e for e in errors if e["loc"][-1] != "str"]


def _is_object_member(part: Any) -> bool:
    """Pydantic's label of the object in ``str | ComputeConfig``; validators put their names around it."""
    return part == "ComputeConfig" or (str(part).startswith("function-") and "ComputeConfig" in str(part))
