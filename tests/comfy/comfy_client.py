"""A ComfyUI server of our own, and a client that speaks to it as the browser does: /prompt, websocket, /history."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import requests
import websocket
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINE = Path(__file__).with_name("engine.py")
TEXT, PREVIEW = 3, 4  # binary messages: a text for a node; a picture with metadata in front of it

Graph = dict[str, dict[str, Any]]


class Refused(Exception):
    """What the server answered to a prompt that it did not take: status and the body's JSON."""

    def __init__(self, status: int, body: dict[str, Any]):
        super().__init__(f"{status}: {json.dumps(body)}")
        self.status, self.body = status, body

    @property
    def reasons(self) -> str:
        """All messages of all nodes, each of which must be said once."""
        errors = [error for node in self.body.get("node_errors", {}).values() for error in node["errors"]]
        said = [error["details"].partition(" - ")[2] or error["details"] for error in errors]
        assert len({*said}) == len(said), said  # ComfyUI repeats for every input what a node returns
        return "\n".join(f"{error['message']} {error['details']}" for error in errors)


@dataclass
class Result:
    """What came of a prompt."""

    status: str
    """success, error or interrupted."""
    outputs: dict[str, dict[str, Any]]
    """By node, what its interface shows."""
    error: str = ""
    error_node: str = ""
    seconds: float = 0.0
    progress: list[tuple[str, int, int]] = field(default_factory=list)
    """(node, value, maximum), in order."""
    previews: list[Image.Image] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    """(node, what is written on it), in order."""


class Comfy:
    """One running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base: Path, log: Path):
        self.process, self.base, self.log = process, base, log
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"

    def get(self, path: str) -> Any:
        """A page's JSON."""
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        """A page's content."""
        answer = requests.get(f"{self.url}{path}", timeout=60)
        answer.raise_for_status()
        return answer.content

    def submit(self, graph: Graph, client: str = "") -> str:
        """Queue a graph in API format; the prompt's id.

        Raises:
            Refused: it does not validate.
        """
        answer = requests.post(f"{self.url}/prompt", json={"prompt": graph, "client_id": client}, timeout=60)
        if answer.status_code != 200:
            raise Refused(answer.status_code, answer.json())
        return answer.json()["prompt_id"]

    def run(self, graph: Graph, timeout_s: float = 300) -> Result:
        """Queue a graph and wait for its end."""
        with self.listening() as (client, messages):
            return self.follow(self.submit(graph, client), messages, timeout_s)

    @contextmanager
    def listening(self) -> Iterator[tuple[str, websocket.WebSocket]]:
        """A client's id, and the messages that the server sends to it from now on."""
        client = uuid.uuid4().hex
        messages = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=60)
        # As the browser says, so that previews come with the node that they belong to.
        messages.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        try:
            yield client, messages
        finally:
            messages.close()

    def follow(self, prompt: str, messages: websocket.WebSocket, timeout_s: float = 300) -> Result:
        """Read messages until a prompt has ended."""
        result, start = Result("", {}), time.monotonic()
        while not result.status:
            messages.settimeout(max(0.1, timeout_s - (time.monotonic() - start)))
            message = messages.recv()
            if isinstance(message, bytes):
                self._binary(message, result)
                continue
            kind, data = (content := json.loads(message))["type"], content["data"]
            if data.get("prompt_id", prompt) != prompt:
                continue
            if kind == "progress":
                result.progress.append((data["node"], data["value"], data["max"]))
            elif kind == "execution_error":
                result.status, result.error = "error", data["exception_message"]
                result.error_node = data["node_id"]
            elif kind == "execution_interrupted":
                result.status = "interrupted"
            elif kind == "execution_success":
                result.status = "success"
        result.seconds = time.monotonic() - start
        while prompt not in (history := self.get(f"/history/{prompt}")):  # written after the last message is sent
            time.sleep(0.02)
        result.outputs = history[prompt]["outputs"]
        return result

    @staticmethod
    def _binary(message: bytes, result: Result) -> None:
        kind, size = struct.unpack(">II", message[:8])
        if kind == PREVIEW:
            result.previews.append(Image.open(BytesIO(message[8 + size :])))
        elif kind == TEXT:
            result.texts.append((message[8 : 8 + size].decode(), message[8 + size :].decode()))

    def interrupt(self) -> None:
        """What the Cancel button does."""
        requests.post(f"{self.url}/interrupt", timeout=60).raise_for_status()

    def image(self, described: dict[str, str]) -> Image.Image:
        """A picture that a node shows."""
        answer = requests.get(f"{self.url}/view", params=described, timeout=60)
        answer.raise_for_status()
        return Image.open(BytesIO(answer.content))

    def stop(self) -> None:
        """End the server."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start(base: Path, *arguments: str, link: bool = True, environment: dict[str, str] | None = None) -> Comfy:
    """A server whose folders are in `base`, with this repository as a custom node, ready to be asked."""
    nodes = base / "custom_nodes" / "ngrpo-lora"
    nodes.parent.mkdir(parents=True, exist_ok=True)
    if link and not nodes.exists():
        nodes.symlink_to(REPOSITORY, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(ENGINE), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
            + ["--disable-auto-launch", "--disable-api-nodes", "--preview-method", "none"]
            + ["--base-directory", str(base), "--database-url", f"sqlite:///{base}/comfyui.db", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=base,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"} | (environment or {}),
        )
    comfy = Comfy(process, port, base, log)
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            comfy.get("/system_stats")
            return comfy
        except requests.ConnectionError:
            time.sleep(0.5)
    comfy.stop()
    raise RuntimeError(f"ComfyUI did not start:\n{log.read_text(errors='replace')[-4000:]}")
