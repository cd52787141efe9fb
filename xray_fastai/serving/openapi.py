"""The API as OpenAPI 3.1 describes it; the shapes of the answers are those that `answers` makes them from."""

from typing import Any

from pydantic.json_schema import models_json_schema

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.serving.predictions import Health, Predictions, Problem
from xray_fastai.serving.uploads import MAX_FILE, MAX_FILES, MAX_REQUEST, UPLOAD_SECONDS

REFUSALS = {
    "400": "No form, or no file in it, or more files than allowed.",
    "403": "Sent by a page of another site.",
    "408": f"The files took more than {UPLOAD_SECONDS} s to arrive.",
    "413": f"More than {MAX_REQUEST:,} bytes.",
    "415": "No `multipart/form-data`.",
    "421": "The Host header names no address of this server.",
    "500": "A bug: please report it.",
    "503": "Busy, or the device is out of memory.",
}


def describe_api() -> dict[str, Any]:
    """The document that `GET /openapi.json` answers."""
    models = [(model, "serialization") for model in (Health, Predictions, Problem)]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    refusals = {status: _answer(why, "Problem") for status, why in REFUSALS.items()}
    refusals["503"]["headers"] = {
        "Retry-After": {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}
    }
    files = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_FILES,
        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
        "description": f"Each at most {MAX_FILE:,} bytes.",
    }
    form = {"type": "object", "required": ["file"], "properties": {"file": files}}
    heatmap = {
        "name": "heatmap",
        "in": "query",
        "description": "With pictures: the image as it was read, and its heat map.",
        "schema": {"type": "boolean", "default": True},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "xray-fastai",
            "version": __version__,
            "description": f"A chest X-ray classifier. {DISCLAIMER} Nothing that is sent is kept.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [],
        "paths": {
            "/predict": {
                "post": {
                    "operationId": "predict",
                    "summary": "Predict one or several images.",
                    "parameters": [heatmap],
                    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
                    "responses": {
                        "200": _answer(
                            "A prediction a file, or the error of a file that can't be read.", "Predictions"
                        ),
                        **refusals,
                    },
                }
            },
            "/health": {
                "get": {
                    "operationId": "health",
                    "summary": "The server is up; which model it answers by.",
                    "responses": {"200": _answer("It is.", "Health"), "421": refusals["421"]},
                }
            },
        },
        "components": {"schemas": schemas["$defs"]},
    }


def _answer(description: str, schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": content}
