"""An HTTP server that gives prepared answers and keeps what it was asked."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """`before` runs first, in the thread of the request."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], Any] = bool


# In OpenAI's protocol

CHAT, MODELS = "/v1/chat/completions", "/v1/models"


def models(*names: str) -> Answer:
    return Answer({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


ONE_MODEL = models("vlm")


def says(
    text: str | None, logprobs: dict[str, float] | None = None, finish_reason: str = "stop", **settings: Any
) -> Answer:
    """A completion; `logprobs` are probabilities of the first token."""
    first = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in (logprobs or {}).items()]
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": [{**first[0], "top_logprobs": first}]} if first else None,
    }
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "vlm", "choices": [choice]}
    return Answer(body, **settings)


@dataclass(frozen=True)
class Request:
    """Names of headers are in lower case."""

    headers: dict[str, str]
    body: Any


class ScriptedServer(ThreadingHTTPServer):
    """`answers[path]` are given in turn, the last one for ever."""

    request_queue_size = 64

    def __init__(self, answers: dict[str, list[Answer]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.requests: dict[str, list[Request]] = {path: [] for path in answers}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.requests[self.path].append(Request(headers, json.loads(body or "null")))
            answers = self.server.answers[self.path]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer.before()
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        kind = "text/html" if isinstance(answer.body, str) else "application/json"
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass
