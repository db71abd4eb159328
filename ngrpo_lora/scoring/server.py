"""`ngrpo reward-server`: rewards of this machine over HTTP, for the reward `remote` of another.

    GET  /health  answers {"protocol": 1, "rewards": {"ocr": "single", ...}}: what each is called with
    POST /score   takes   {"reward": "ocr", "images": [base64 of PNG, WebP or JPEG], "prompts": ["..."],
                           "metadata": [{...}], "group_size": 1}
                  answers {"scores": [0.875, null, ...]}, null where there is no score

Each `group_size` images in a row are candidates of one prompt. An error is {"error": "why"} with status 400 (not such
a request), 401, 404, 411, 413 (too large), 415 or 500. Where NGRPO_REWARD_TOKEN is set, every request needs the
header `Authorization: Bearer TOKEN`. What arrives is JSON and pixels: nothing is unpickled, nothing is run.
"""

from __future__ import annotations

import base64
import hmac
import io
import ipaddress
import json
import logging
import math
import re
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image
from pydantic import Field, ValidationError, model_validator

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig, Section
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._http import PROTOCOL, TOKEN_ENV
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

__all__ = ["MAX_REQUEST_BYTES", "MAX_REQUEST_PIXELS", "RewardServer"]

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 2**28
MAX_REQUEST_PIXELS = 2**27  # 128 images of 1024 x 1024 px, 400 MB
IMAGE_FORMATS = ("PNG", "WEBP", "JPEG")


class ScoreRequest(Section, frozen=True):
    """The validated JSON body of POST /score."""

    reward: str
    images: list[str] = Field(min_length=1)
    prompts: list[str]
    metadata: list[dict[str, Any]]
    group_size: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _lengths_fit(self) -> ScoreRequest:
        images, prompts, metadata = len(self.images), len(self.prompts), len(self.metadata)
        if not images == prompts == metadata:
            raise ValueError(f"images, prompts and metadata must be equally many, got {images}, {prompts}, {metadata}")
        if images % self.group_size:
            raise ValueError(f"images must be a multiple of group_size {self.group_size}, got {images}")
        return self


class RefusedError(Exception):
    """A refusal of a request: the status and the reason of its answer."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """An HTTP server that scores images by its rewards, which clients name by their labels."""

    request_queue_size = 128

    def __init__(self, configs: Sequence[RewardConfig], host: str, port: int, device: str, token: str | None = None):
        """Take the address, load the rewards, then listen.

        Args:
            port: 0 for any free one, see `url`.
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
        self.token = token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
            self.scorer = Scorer(configs, device)
            self.server_activate()
        except (OSError, OverflowError) as error:
            self.server_close()
            raise UserError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from None
        except BaseException:
            self.server_close()
            raise

    @property
    def url(self) -> str:
        """The address at which the server listens, with its port."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host}:{port}"

    def health(self) -> dict[str, Any]:
        """Answer GET /health with the protocol's number and the form of each reward."""
        return {"protocol": PROTOCOL, "rewards": {label: reward.form for label, reward in self.scorer.rewards.items()}}

    def score(self, body: bytes) -> dict[str, Any]:
        """Answer POST /score with a score for each image; RefusedError where the request gets none."""
        try:
            request = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors())
            raise RefusedError(HTTPStatus.BAD_REQUEST, "; ".join(problems)) from None
        labels = list(self.scorer.rewards)
        if request.reward not in labels:
            known = f"{', '.join(labels)}{registry.nearest(request.reward, labels)}"
            raise RefusedError(HTTPStatus.NOT_FOUND, f"no reward {request.reward!r} here, only {known}")
        samples = Samples(_decode(request.images), request.prompts, request.metadata, request.group_size)
        try:
            scores = self.scorer.rewards[request.reward](samples).tolist()
        except UserError as error:
            raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None
        return {"scores": [score if math.isfinite(score) else None for score in scores]}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a connection broke, or that answering it failed."""
        log.warning("the connection to %s broke", client_address[0], exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # s without a byte, after which the connection is closed

    def do_GET(self) -> None:
        self.answer("/health", lambda body: self.server.health())

    def do_POST(self) -> None:
        self.answer("/score", self.server.score)

    def answer(self, path: str, call: Callable[[bytes], dict[str, Any]]) -> None:
        """Send the result of `call` on the request's body, or the reason why there is none."""
        try:
            body = self.body()
            if self.path != path:
                what = f"{self.command} {self.path}"
                raise RefusedError(HTTPStatus.NOT_FOUND, f"there are GET /health and POST /score, got {what}")
            status, result = HTTPStatus.OK, call(body)
        except RefusedError as error:
            status, result = error.status, {"error": str(error)}
        self.send(status, result)

    def body(self) -> bytes:
        """Read the body of the request; RefusedError where its token, length or type does not allow that."""
        length = self.headers.get("Content-Length", "0")
        refused = None
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,18}", length):
            refused = RefusedError(HTTPStatus.LENGTH_REQUIRED, "a request must give its Content-Length")
        elif not self.is_authorized():
            self.rfile.read(min(int(length), 2**16))  # a client reads no answer before a short body is read
            refused = RefusedError(HTTPStatus.UNAUTHORIZED, f"the request must bring the token of {TOKEN_ENV}")
        elif int(length) > MAX_REQUEST_BYTES:
            limit = f"at most {MAX_REQUEST_BYTES} bytes, got {length}; send fewer images (batch_size)"
            refused = RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request must have {limit}")
        if refused is not None:
            self.close_connection = True  # what is left of the body is no next request
            raise refused
        body = self.rfile.read(int(length))
        if self.command == "POST" and self.headers.get_content_type() != "application/json":
            kind = self.headers.get_content_type()
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a request must be application/json, got {kind}")
        return body

    def is_authorized(self) -> bool:
        """Whether the request brings the token, compared in constant time."""
        if self.server.token is None:
            return True
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode())

    def send(self, status: HTTPStatus, result: dict[str, Any]) -> None:
        """Send a whole response: status, headers, and the result as JSON."""
        body = json.dumps(result, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses with an error of our form, and close the connection."""
        self.close_connection = True
        self.send(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request at debug level, in place of printing it."""
        log.debug(format, *args)


def _decode(images: Sequence[str]) -> list[Image.Image]:
    """Decode base64 to RGB images; the pixels of each are counted before they are unpacked."""
    decoded: list[Image.Image] = []
    pixels = 0
    for index, text in enumerate(images):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=IMAGE_FORMATS)
            pixels += image.width * image.height
            if pixels <= MAX_REQUEST_PIXELS:
                decoded.append(image.convert("RGB"))
        except Exception as error:  # Pillow has many kinds for a broken file
            what = f"images.{index} must be the base64 of an image in {', '.join(IMAGE_FORMATS)}: {error}"
            raise RefusedError(HTTPStatus.BAD_REQUEST, what) from None
        if pixels > MAX_REQUEST_PIXELS:
            limit = f"at most {MAX_REQUEST_PIXELS} pixels, got {pixels} with images.{index}; send fewer images"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request must have {limit} (batch_size)")
    return decoded


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
