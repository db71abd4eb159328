"""The voting page over HTTP, and its address, which holds the token that lets people in.

    GET  /TOKEN/                    the page, one file that loads nothing else
    GET  /TOKEN/state               what it shows, as JSON
    GET  /TOKEN/pictures/NAME.png   a picture
    POST /TOKEN/ballot              {"group": "NAME", "said": "order", "orders": [[[2], [0, 1, 3]]]}
    POST /TOKEN/undo                {"group": "NAME"}, whose vote is taken back

Posts answer with the new state; an error is {"error": "why", "state": ...} with status 400 (not such a request), 409
(the group is gone, or it is too late) or 507 (the vote cannot be written). Any other address has status 404.
"""

from __future__ import annotations

import hmac
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ngrpo_lora.config.section import Section
from ngrpo_lora.errors import UserError
from ngrpo_lora.voting.booth import Booth, Gone

__all__ = ["PORT", "PageServer", "hosts_of"]

PORT = 8770
"""Where the page is when no port was asked for and this one is free."""

MAX_BODY_BYTES = 2**14  # a thousand pairs; the likelihood of more takes seconds
MAX_CONNECTIONS = 64
STOPPING_S = 1

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    "Referrer-Policy": "no-referrer",  # the address is a secret
    "X-Content-Type-Options": "nosniff",
}
STRANGER = "There is no page here. Open the whole address that the run has printed; its last part is a token."


class _Posted(Section, frozen=True):
    """The body of POST ballot."""

    group: str
    said: Literal["order", "none", "skip"]
    orders: list[list[list[int]]] = []


class _Undone(Section, frozen=True):
    """The body of POST undo."""

    group: str


class PageServer:
    """Serves the page of a booth from a thread of its own, until it is closed.

    port: where it listens.
    """

    def __init__(self, booth: Booth, host: str, port: int | None, token: str):
        """Take the address and start to answer.

        Args:
            port: None for PORT, or any free one where that is taken.
            token: what the address holds after the port.
        Raises:
            UserError: the address cannot be had.
        """
        self.booth, self.host, self.token = booth, host, token
        self.page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        self.socket = _bound(host, port)
        self.port: int = self.socket.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.application(),
                lifespan="off",
                log_config=None,
                access_log=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=STOPPING_S,
            )
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    @property
    def addresses(self) -> list[str]:
        """Where the page is: as this machine reaches it, and, where it listens to all, as others do."""
        return [f"http://{host}:{self.port}/{self.token}/" for host in hosts_of(self.host)]

    def close(self) -> None:
        """Answer what is under way, and give the address back."""
        self.server.should_exit = True
        self.thread.join(2 * STOPPING_S)
        self.socket.close()

    def application(self) -> Starlette:
        """The addresses below the token; all others are not found."""
        return Starlette(
            routes=[
                Route("/{token}/", self.known(self.get_page)),
                Route("/{token}/state", self.known(self.get_state)),
                Route("/{token}/pictures/{name}.png", self.known(self.get_picture)),
                Route("/{token}/ballot", self.known(self.post_ballot), methods=["POST"]),
                Route("/{token}/undo", self.known(self.post_undo), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _refusal},
        )

    def known(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Answer with the page's headers if the address has the token, compared in constant time."""

        async def checked(request: Request) -> Response:
            if not hmac.compare_digest(request.path_params["token"].encode(), self.token.encode()):
                raise HTTPException(404)
            response = await answer(request)
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return checked

    async def get_page(self, request: Request) -> Response:
        """Answer with the page."""
        return HTMLResponse(self.page)

    async def get_state(self, request: Request) -> Response:
        """Answer with what the page shows."""
        return JSONResponse(await run_in_threadpool(self.booth.state))

    async def get_picture(self, request: Request) -> Response:
        """Answer with a picture, which never changes."""
        data = await run_in_threadpool(self.booth.picture, request.path_params["name"])
        if data is None:
            raise HTTPException(404)
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    async def post_ballot(self, request: Request) -> Response:
        """Take a vote."""
        body = await _body(request)

        def cast() -> None:
            posted = _Posted.model_validate_json(body)
            self.booth.cast(posted.group, posted.said, posted.orders)

        return await self.answered(cast)

    async def post_undo(self, request: Request) -> Response:
        """Take a vote back."""
        body = await _body(request)
        return await self.answered(lambda: self.booth.undo(_Undone.model_validate_json(body).group))

    async def answered(self, action: Callable[[], None]) -> Response:
        """Do what was posted, and answer with the new state, and with the reason where it could not be done."""
        status, reason = 200, None
        try:
            await run_in_threadpool(action)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc'])) or 'vote'}: {e['msg']}" for e in error.errors())
            status, reason = 400, "; ".join(problems)
        except Gone as error:
            status, reason = 409, str(error)
        except UserError as error:
            status, reason = 507, str(error)
        state = await run_in_threadpool(self.booth.state)
        return JSONResponse(state if reason is None else {"error": reason, "state": state}, status)


def hosts_of(host: str) -> list[str]:
    """How a server that listens at `host` is reached: by this machine and, where it listens to all, by others."""
    hosts = {"0.0.0.0": ["127.0.0.1", _own_address()], "::": ["[::1]", _own_address()]}.get(host)
    return [*dict.fromkeys(hosts or [f"[{host}]" if ":" in host else host])]


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a vote has at most {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = STRANGER if error.status_code == 404 else error.detail
    return PlainTextResponse(text, error.status_code, {"Cache-Control": "no-store", **(error.headers or {})})


def _bound(host: str, port: int | None) -> socket.socket:
    """A socket at an address that is free.

    Raises:
        UserError: it is taken, or none of this machine.
    """
    problem: Exception | None = None
    for candidate in (PORT, 0) if port is None else (port,):
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            if os.name != "nt":  # where it would let two programs have one port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, candidate))
            bound.listen(128)
        except (OSError, OverflowError) as error:
            bound.close()
            problem = error
        else:
            return bound
    raise UserError(
        f"the voting page cannot be at {host}, port {PORT if port is None else port}: {problem}; choose another port "
        "or host of the reward vote, or leave the port out for a free one"
    )


def _own_address() -> str:
    """This machine's address in its network, as its route to other machines says; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of no machine: RFC 5737
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
