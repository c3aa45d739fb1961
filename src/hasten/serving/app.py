"""The routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

import hasten
from hasten.serving import chat, completions, embeddings, openapi
from hasten.serving import openai_requests as fields
from hasten.serving.admission import Space
from hasten.serving.bodies import Decoder, check_bulk
from hasten.serving.errors import ApiError, invalid
from hasten.serving.exchange import ClientGone, Exchange, read_body
from hasten.serving.gate import Gate
from hasten.serving.openai_responses import encode
from hasten.serving.service import Body, Service

UI = Path(__file__).parent / "ui"
UI_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

TOKENIZE = Decoder(fields.TokenizeRequest)
DETOKENIZE = Decoder(fields.DetokenizeRequest)


def create_app(service: Service) -> FastAPI:
    """The application. Whoever runs it also runs ``service.load()`` and ``service.close()``."""
    app = FastAPI(
        title="hasten",
        version=hasten.__version__,
        description="OpenAI-compatible API of hasten. Errors are {'error': {message, type, param, "
        "code}}; unknown fields are named in the header X-Hasten-Ignored.",
        redoc_url=None,
    )
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_condition(app, service)
    if UI.is_dir():
        app.mount("/ui", _Page(directory=UI, html=True), name="ui")
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_middleware(Gate, service=service)
    if service.config.cors_origin:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "x-hasten-ignored", "retry-after"],
        )
    openapi.describe(app, service)
    return app


def json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


# ---- generation ----------------------------------------------------------------------------------


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", tags=["OpenAI"], response_model=None)
    async def complete(request: Request) -> Response:
        """Continue prompts."""
        return Exchange(service, "completions", partial(completions.prepare, service))

    @app.post("/v1/chat/completions", tags=["OpenAI"], response_model=None)
    async def answer(request: Request) -> Response:
        """Answer a conversation."""
        return Exchange(service, "chat", partial(chat.prepare, service))

    @app.post("/v1/embeddings", tags=["OpenAI"], response_model=None)
    async def embed(request: Request) -> Response:
        """Vectors of texts."""
        return Exchange(service, "embeddings", partial(embeddings.prepare, service))


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        facts = service.engine.facts
        return {
            "id": name,
            "object": "model",
            "created": int(service.started),
            "owned_by": "hasten",
            "root": facts.model,
            "parent": None,
            "max_model_len": facts.max_length,
        }

    @app.get("/v1/models", tags=["OpenAI"], response_model=None)
    async def models() -> Response:
        """The served model, under each of its names."""
        _ = service.prompter  # loaded, or 503
        return json({"object": "list", "data": [card(name) for name in service.config.names]})

    @app.get("/v1/models/{name:path}", tags=["OpenAI"], response_model=None)
    async def model(name: str) -> Response:
        """One name of the model."""
        _ = service.prompter
        service.check_model(name)
        return json(card(name))


# ---- tokens --------------------------------------------------------------------------------------


def _add_tokens(app: FastAPI, service: Service) -> None:
    async def run(request: Request, work: Callable[[Body], tuple[Any, list[str]]]) -> Response:
        _ = service.prompter
        space = Space(service.admission)
        try:
            body = await read_body(request.scope, request.receive, service, space)
            answer, unknown = await service.aside(work, body)
            return Response(
                encode(answer), headers=service.ignored(unknown), media_type="application/json"
            )
        except ClientGone:
            return Response(status_code=400)
        finally:
            space.release()

    def to_tokens(body: Body) -> tuple[Any, list[str]]:
        prompter = service.prompter
        check_bulk(body, prompter.longest_text)
        request, others = TOKENIZE.decode(body)
        unknown = fields.refuse_unsupported(others)
        service.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if request.prompt is not None:
            ids = prompter.encode(request.prompt, request.add_special_tokens is not False)
        else:
            ids = prompter.conversation(request)
        names = [prompter.token_text(i) for i in ids] if request.return_token_strs else None
        found = {
            "count": len(ids),
            "max_model_len": prompter.facts.max_length,
            "tokens": ids,
            "token_strs": names,
        }
        return found, unknown

    def to_text(body: Body) -> tuple[Any, list[str]]:
        prompter = service.prompter
        check_bulk(body, prompter.longest_text)
        request, others = DETOKENIZE.decode(body)
        unknown = fields.refuse_unsupported(others)
        service.check_model(request.model)
        prompter.check_ids(request.tokens, "tokens")
        return {"prompt": prompter.decode(request.tokens, False)}, unknown

    @app.get("/tokenizer_info", tags=["Tokens"], response_model=None)
    async def tokenizer_info() -> Response:
        """What a client needs to use /tokenize in place of a tokenizer of its own."""
        tokenizer = service.prompter.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: tokenizer.special_tokens.get(name) for name in names}
        return json({**special, "chat_template": tokenizer.chat_templates.get("default")})

    @app.post("/tokenize", tags=["Tokens"], response_model=None)
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or a conversation."""
        return await run(request, to_tokens)

    @app.post("/detokenize", tags=["Tokens"], response_model=None)
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        return await run(request, to_text)


# ---- condition -----------------------------------------------------------------------------------


def _add_condition(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)  # load balancers ask so
    @app.get("/health", tags=["Condition"], response_model=None)
    async def health() -> Response:
        """Alive: 503 only when the engine has stopped."""
        if service.engine.dead.is_set():
            return json({"status": "dead", "reason": "the engine has stopped"}, 503)
        return json({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["Condition"], response_model=None)
    async def ready() -> Response:
        """Whether requests should come here: loaded, not shutting down, making progress."""
        reason = service.not_ready()
        if reason is not None:
            return json({"ready": False, "reason": reason}, 503)
        return json({"ready": True})

    @app.head("/ping", include_in_schema=False)
    @app.get("/ping", tags=["Condition"], response_model=None)
    async def ping() -> Response:
        """As /health; some platforms ask here."""
        return await health()

    @app.get("/metrics", tags=["Condition"], response_model=None)
    async def metrics() -> Response:
        """Prometheus metrics."""
        body, kind = service.metrics.render()
        return Response(body, headers={"content-type": kind})

    @app.get("/version", tags=["Condition"], response_model=None)
    async def version() -> Response:
        """Version of the server."""
        return json({"version": hasten.__version__})

    @app.get("/hasten/config", tags=["Condition"], response_model=None)
    async def config() -> Response:
        """The effective configuration, secrets masked, and what was loaded."""
        return json(service.configuration())

    @app.get("/hasten/stats", tags=["Condition"], response_model=None)
    async def stats() -> Response:
        """Figures of the last seconds, for the page at /ui."""
        return json(service.metrics.stats())


class _Page(StaticFiles):
    """The page at /ui: nothing from elsewhere, nobody's frame."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers["content-security-policy"] = UI_POLICY
        response.headers["cache-control"] = "no-cache"
        return response


# ---- errors -------------------------------------------------------------------------------------


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses."""
    assert isinstance(error, HTTPException)
    what = {404: "no such route", 405: "this route takes another method"}
    message = f"{what.get(error.status_code, str(error.detail))}; GET /docs lists the routes"
    answer = ApiError(error.status_code, message, code="unknown_route")
    return Response(
        answer.body(), error.status_code, headers=error.headers, media_type="application/json"
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers=headers, media_type="application/json")
