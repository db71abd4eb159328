"""`ngrpo reward-server`: rewards of this machine over HTTP, for the reward `remote` of another.

    GET  /health  answers {"protocol": 1, "rewards": {"ocr": "single", ...}}: what each is called with
    POST /score   takes   {"reward": "ocr", "images": [base64 of PNG, WebP or JPEG], "prompts": ["..."],
                           "metadata": [{...}], "group_size": 1, and of edits "pictures": [{"source": base64}, ...]}
                  answers {"scores": [0.875, null, ...]}, null where there is no score

Each `group_size` images in a row are candidates of one prompt; rewards get `pictures` as metadata. An error is
{"error": "why"} with status 400 (not such a request), 401, 404, 405, 408 (a body that stalls), 413 (too large), 415 or
500. Where NGRPO_REWARD_TOKEN is set, every request needs the header `Authorization: Bearer TOKEN`. What arrives is JSON
and pixels: nothing is unpickled, nothing is run.

Starlette and uvicorn speak HTTP; what they refuse themselves (400 for what is no HTTP, 503 above MAX_CONNECTIONS) is
plain text.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import ipaddress
import logging
import math
import socket
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import uvicorn
from PIL import Image
from pydantic import Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, BaseUser, SimpleUser
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig, Section
from ngrpo_lora.errors import UserError
from ngrpo_lora.records.pictures import as_seen
from ngrpo_lora.rewards._http import PROTOCOL, TOKEN_ENV
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

__all__ = ["MAX_REQUEST_BYTES", "MAX_REQUEST_PIXELS", "RewardServer"]

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 2**28
MAX_REQUEST_PIXELS = 2**27  # 128 images of 1024 x 1024 px, 400 MB
MAX_REQUESTS_IN_MEMORY = 8  # more wait with their bodies unread
MAX_CONNECTIONS = 256
STALLED_S = 60.0  # without a byte of a body that is not complete
IDLE_S = 60  # between the requests of a connection
STOPPING_S = 60  # for answers under way when the server is asked to stop
IMAGE_FORMATS = ("PNG", "WEBP", "JPEG")


class ScoreRequest(Section, frozen=True):
    """The validated JSON body of POST /score."""

    reward: str
    images: list[str] = Field(min_length=1)
    prompts: list[str]
    metadata: list[dict[str, Any]]
    group_size: int = Field(default=1, ge=1)
    pictures: list[dict[str, str]] | None = None

    @model_validator(mode="after")
    def _lengths_fit(self) -> ScoreRequest:
        images, prompts, metadata = len(self.images), len(self.prompts), len(self.metadata)
        if not images == prompts == metadata:
            raise ValueError(f"images, prompts and metadata must be equally many, got {images}, {prompts}, {metadata}")
        if self.pictures is not None and len(self.pictures) != images:
            raise ValueError(f"pictures must be as many as images, got {len(self.pictures)} for {images}")
        if images % self.group_size:
            raise ValueError(f"images must be a multiple of group_size {self.group_size}, got {images}")
        return self


class RewardServer:
    """An HTTP server that scores images by its rewards, which clients name by their labels."""

    def __init__(self, configs: Sequence[RewardConfig], host: str, port: int, device: str, token: str | None = None):
        """Take the address, load the rewards, then listen; `serve` answers.

        Args:
            port: 0 for any free one, see `port`.
            device: where rewards put their networks when their own settings say `auto`.
            token: what every request must bring; None: nothing, for this machine alone.
        Raises:
            UserError: the address reaches beyond this machine and there is no token, it is taken, or what a reward
                needs is missing.
        """
        if not token and not _is_local(host):
            raise UserError(
                f"--host {host} lets other machines in, which needs a token; set the environment variable {TOKEN_ENV} "
                f"to the same secret here and where you train"
            )
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((host, port))
            self.scorer = Scorer(configs, device)
            self.socket.listen(128)
        except (OSError, OverflowError) as error:
            self.socket.close()
            raise UserError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from None
        except BaseException:
            self.socket.close()
            raise
        self.places = asyncio.Semaphore(MAX_REQUESTS_IN_MEMORY)
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.application(token),
                lifespan="off",
                log_config=None,
                access_log=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=IDLE_S,
                timeout_graceful_shutdown=STOPPING_S,
            )
        )

    def application(self, token: str | None) -> Starlette:
        """The two addresses, behind the token if there is one; all errors have the same form."""
        middleware = []
        if token:
            middleware = [Middleware(AuthenticationMiddleware, backend=TokenBackend(token), on_error=_without_token)]
        return Starlette(
            routes=[Route("/health", self.health), Route("/score", self.score, methods=["POST"])],
            middleware=middleware,
            exception_handlers={HTTPException: _refusal, Exception: _failure},
        )

    @property
    def port(self) -> int:
        """The port at which the server listens."""
        return self.socket.getsockname()[1]

    @property
    def url(self) -> str:
        """The address at which the server listens, with its port."""
        host = self.socket.getsockname()[0]
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def serve(self) -> None:
        """Answer until Ctrl-C, SIGTERM or `stop`; then finish what is under way, for up to STOPPING_S."""
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self.socket.close()

    def stop(self) -> None:
        """Ask `serve`, in another thread, to return."""
        self.server.should_exit = True

    async def health(self, request: Request) -> Response:
        """Answer GET /health with the protocol's number and the form of each reward."""
        rewards = {label: reward.form for label, reward in self.scorer.rewards.items()}
        return JSONResponse({"protocol": PROTOCOL, "rewards": rewards})

    async def score(self, request: Request) -> Response:
        """Answer POST /score with a score for each image; HTTPException where the request gets none."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"a request must be application/json, got {kind or 'none'}")
        async with self.places:
            body = await _body(request)
            scores = await run_in_threadpool(self.scores, body)
        return JSONResponse({"scores": [score if math.isfinite(score) else None for score in scores]})

    def scores(self, body: bytes) -> list[float]:
        """Scores for the images of a request's body, NaN where there is none; HTTPException where it is none."""
        try:
            request = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors())
            raise HTTPException(400, "; ".join(problems)) from None
        labels = list(self.scorer.rewards)
        if request.reward not in labels:
            known = f"{', '.join(labels)}{registry.nearest(request.reward, labels)}"
            raise HTTPException(404, f"no reward {request.reward!r} here, only {known}")
        rows = request.pictures or [{}] * len(request.images)
        distinct = list(dict.fromkeys(text for row in rows for text in row.values()))  # a group shares its source
        images = _decode([*request.images, *distinct])
        seen = dict(zip(distinct, images[len(request.images) :], strict=True))
        metadata = [
            own | {name: seen[text] for name, text in row.items()}
            for own, row in zip(request.metadata, rows, strict=True)
        ]
        samples = Samples(images[: len(rows)], request.prompts, metadata, request.group_size)
        try:
            return self.scorer.rewards[request.reward](samples).tolist()
        except UserError as error:
            raise HTTPException(500, str(error)) from None


class TokenBackend(AuthenticationBackend):
    """Lets in whoever brings the token, compared in constant time."""

    def __init__(self, token: str):
        self.expected = f"Bearer {token}".encode()

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser]:
        """Raise an AuthenticationError where the request does not bring the token."""
        if not hmac.compare_digest(conn.headers.get("authorization", "").encode(), self.expected):
            raise AuthenticationError(f"the request must bring the token of {TOKEN_ENV}")
        return AuthCredentials(), SimpleUser("trainer")


def _without_token(connection: HTTPConnection, error: AuthenticationError) -> Response:
    """Answer a request that does not bring the token; its body stays unread."""
    return JSONResponse({"error": str(error)}, 401, {"WWW-Authenticate": "Bearer"})


def _refusal(request: Request, error: Exception) -> Response:
    """Answer with the reason of an HTTPException."""
    assert isinstance(error, HTTPException)
    reason = error.detail
    if reason in (HTTPStatus.NOT_FOUND.phrase, HTTPStatus.METHOD_NOT_ALLOWED.phrase):  # of Starlette itself
        reason = f"there are GET /health and POST /score, got {request.method} {request.url.path}"
    return JSONResponse({"error": reason}, error.status_code, error.headers)


def _failure(request: Request, error: Exception) -> Response:
    """Answer where this server itself is at fault; uvicorn logs the traceback."""
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)


async def _body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        HTTPException: it is larger than MAX_REQUEST_BYTES, by its header or as it comes, or stalls.
    """
    length = int(request.headers.get("content-length", "0"))  # uvicorn lets only numbers through
    body = bytearray()
    chunks = request.stream()
    try:
        while length <= MAX_REQUEST_BYTES:
            async with asyncio.timeout(STALLED_S):
                body += await anext(chunks)
            length = max(length, len(body))
    except StopAsyncIteration:
        return bytes(body)
    except TimeoutError:
        reason = f"the request must come whole, but nothing came for {STALLED_S:g} s"
        raise HTTPException(408, reason, {"Connection": "close"}) from None
    limit = f"at most {MAX_REQUEST_BYTES} bytes, got {length}; send fewer images (batch_size)"
    raise HTTPException(413, f"a request must have {limit}")


def _decode(images: Sequence[str]) -> list[Image.Image]:
    """Decode base64 to images as people see them; the pixels of each are counted before they are unpacked."""
    decoded: list[Image.Image] = []
    pixels = 0
    for index, text in enumerate(images):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=IMAGE_FORMATS)
            pixels += image.width * image.height
            if pixels <= MAX_REQUEST_PIXELS:
                decoded.append(as_seen(image))
        except Exception as error:  # Pillow has many kinds for a broken file
            what = f"images.{index} must be the base64 of an image in {', '.join(IMAGE_FORMATS)}: {error}"
            raise HTTPException(400, what) from None
        if pixels > MAX_REQUEST_PIXELS:
            limit = f"at most {MAX_REQUEST_PIXELS} pixels, got {pixels} with images.{index}; send fewer images"
            raise HTTPException(413, f"a request must have {limit} (batch_size)")
    return decoded


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
