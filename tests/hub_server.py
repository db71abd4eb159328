"""A server on this machine that speaks the Hub's protocol to the real client: repositories, commits, LFS, Xet, pull
requests, downloads; and that fails as it is told to.

Sources: huggingface_hub's requests, Git LFS's batch API, the Xet protocol (huggingface.co/docs/xet).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER, WRITE_TOKEN, READ_TOKEN = "owner", "hf_write", "hf_read"
LARGE = (".safetensors", ".png")  # what the Hub keeps outside git

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Repository:
    """Files by branch, each with its content; commits in their order."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[tuple[str, str]] = field(default_factory=list)
    """(branch, message)"""


@dataclass
class Fault:
    """An answer in place of the real one, a few times over; status 0 resets the connection."""

    method: str
    path: str
    status: int
    times: int = 1
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """`with HubServer() as hub:` its address is `hub.url`; repositories, requests and faults are attributes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.xorbs: dict[bytes, list[bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.before: Callable[[str], object] = lambda request: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = read_body(self)
                request = f"{self.command} {self.path}"
                hub.requests.append(request)
                hub.before(request)
                try:
                    status, headers, content = hub.fault(request) or hub.answer(self, body)
                except Refused as refusal:
                    headers = {"Content-Type": "application/json", "X-Error-Code": refusal.code}
                    status, content = refusal.status, json.dumps({"error": refusal.message}).encode()
                if status == 0:  # without this option the socket would close in order
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/cdn"  # of another host, as the Hub's is

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1, **rest: Any) -> None:
        """Answer so to the next requests whose path matches; `body` and `headers` as given."""
        self.faults.append(Fault(method, path, status, times, **rest))

    def fault(self, request: str) -> Answer | None:
        method, _, path = request.partition(" ")
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                headers = {"Content-Type": "application/json", **fault.headers}
                return fault.status, headers, json.dumps(fault.body).encode()
        return None

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch]

    # The protocol

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        parts = urlsplit(request.path)
        path, query = parts.path, parse_qs(parts.query)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/whoami-v2":
            if token not in (WRITE_TOKEN, READ_TOKEN):
                raise Refused(401, "Invalid credentials in Authorization header")
            return reply({"name": OWNER, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return validate_card(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.+))?", path):
            return self.repository_api(found[1], found[2] or "", query, body, token)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(found[1], json.loads(body), token)
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise Refused(400, "content is not what its name says")
            self.large[found[1]] = body
            return reply({})
        if found := re.fullmatch(r"/cdn/(\w+)", path):
            return 200, {"ETag": f'"{found[1]}"'}, self.large[found[1]]
        if found := re.fullmatch(r"/v1/xorbs/default/(\w+)", path):
            self.xorbs[parse_hash(found[1])] = read_xorb(body)
            return reply({"was_inserted": True})
        if re.fullmatch(r"/(v1/)?shards", path):
            for content in read_shard(body, self.xorbs):
                self.large[hashlib.sha256(content).hexdigest()] = content
            return reply({"result": 1})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], unquote(found[2]), unquote(found[3]))
        raise Refused(404, f"no such page: {path}")

    def create(self, asked: dict[str, Any], token: str) -> Answer:
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not repo.startswith(f"{OWNER}/") or token != WRITE_TOKEN:
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        status = 409 if repo in self.repositories else 200
        if status == 200:
            self.repositories[repo] = Repository(asked.get("visibility") == "private")
        return reply(
            {"url": f"{self.url}/{repo}", "name": repo, "error": "You already created this model repo"}, status
        )

    def repository_api(self, repo: str, action: str, query: dict[str, Any], body: bytes, token: str) -> Answer:
        if repo not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        repository = self.repositories[repo]
        verb, _, rest = action.partition("/")
        revision, create_pr = unquote(rest), "create_pr" in query
        if action == "auth-check":
            return reply({})
        if (
            action == "auth-check/write"
            or verb in ("branch", "xet-write-token")
            or (verb == "commit" and not create_pr)
        ):
            if token != WRITE_TOKEN or not repo.startswith(f"{OWNER}/"):
                raise Refused(403, "Authorization error.")
        if action == "auth-check/write":
            return reply({})
        if verb == "branch":
            if revision in repository.branches:
                raise Refused(409, "Reference already exists")
            repository.branches[revision] = dict(repository.branches["main"])
            return reply({})
        if verb == "xet-write-token":
            fields = {"casUrl": self.url, "accessToken": "cas", "exp": 4_000_000_000}
            headers = {"X-Xet-Cas-Url": self.url, "X-Xet-Access-Token": "cas", "X-Xet-Token-Expiration": "4000000000"}
            status, own, content = reply(fields)
            return status, own | headers, content
        if revision and revision not in repository.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repository.branches[revision or "main"]
        if verb in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            return reply({"id": repo, "sha": self.sha(files), "private": repository.private, "siblings": siblings})
        if verb == "preupload":
            modes = [preupload(file["path"], files) for file in json.loads(body)["files"]]
            return reply({"files": modes})
        if verb == "commit":
            return self.commit(repo, revision, create_pr, [json.loads(line) for line in body.splitlines()])
        raise Refused(404, f"no such action: {action}")

    def commit(self, repo: str, revision: str, create_pr: bool, lines: list[dict[str, Any]]) -> Answer:
        repository, files = self.repositories[repo], dict(self.files(repo, revision))
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        branch = f"refs/pr/{number}" if create_pr else revision
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.large:
                files[value["path"]] = self.large[value["oid"]]
            else:
                raise Refused(400, f"Your push was rejected because an LFS pointer pointed to nothing: {value['path']}")
        repository.branches[branch] = files
        repository.commits.append((branch, lines[0]["value"]["summary"]))
        sha = self.sha(files)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}
        return reply(answer | ({"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if create_pr else {}))

    def lfs_batch(self, repo: str, asked: dict[str, Any], token: str) -> Answer:
        if token != WRITE_TOKEN:
            raise Refused(403, "Authorization error.")
        objects = []
        for wanted in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}}
            objects.append(wanted if wanted["oid"] in self.large else wanted | upload)
        return reply({"transfer": "basic", "objects": objects})

    def resolve(self, repo: str, revision: str, name: str) -> Answer:
        if repo not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        branches = self.repositories[repo].branches
        known = branches | {self.sha(files): files for files in branches.values()}
        if revision not in known:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if name not in known[revision]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = known[revision][name]
        headers = {"X-Repo-Commit": self.sha(known[revision]), "ETag": f'"{blob_id(content)}"'}
        if not name.endswith(LARGE):
            return 200, headers, content
        oid = hashlib.sha256(content).hexdigest()
        self.large[oid] = content
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": f"{self.storage}/{oid}"}
        return 302, headers | linked, b""

    @staticmethod
    def sha(files: dict[str, bytes]) -> str:
        """40 hexadecimal digits that stand for these files."""
        return hashlib.sha1(b"".join(name.encode() + hashlib.sha1(files[name]).digest() for name in files)).hexdigest()


class Refused(Exception):
    """An error as the Hub sends it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


def reply(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def read_body(request: BaseHTTPRequestHandler) -> bytes:
    """Of a known length, or in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


def validate_card(content: str) -> Answer:
    """What the Hub refuses, as far as it matters here."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    problems = [] if data else ["empty metadata"]
    if data.get("license") == "other" and "license_name" not in data:
        problems.append('"license_name" is required')
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")) is None:
        problems.append('"base_model" must be a model id')
    errors = [{"message": problem} for problem in problems]
    return reply({"errors": errors, "warnings": []}, 400 if errors else 200)


def preupload(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    """How a file is to be uploaded, and which content of that name is there."""
    large, content = path.endswith(LARGE), files.get(path)
    oid = None if content is None else hashlib.sha256(content).hexdigest() if large else blob_id(content)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def blob_id(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# Xet: files are sent as chunks, many of them in one xorb, and a shard says which chunks make which file.


def parse_hash(text: str) -> bytes:
    """A hash is written as four 64-bit numbers, little-endian."""
    return b"".join(bytes.fromhex(text[i : i + 16])[::-1] for i in range(0, 64, 16))


def read_xorb(body: bytes) -> list[bytes]:
    """Its chunks: each has its own header and compression."""
    chunks, at = [], 0
    while at < len(body) and body[at] == 0:  # the footer begins with a letter
        packed, kind, size = (int.from_bytes(body[at + a : at + b], "little") for a, b in ((1, 4), (4, 5), (5, 8)))
        data = body[at + 8 : at + 8 + packed]
        if kind:
            data = unpack_lz4(data)
        if kind == 2:  # the first bytes of all groups of four, then the second ones, ...
            lengths = [len(range(i, len(data), 4)) for i in range(4)]
            groups = [data[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(4)]
            data = bytes(groups[i % 4][i // 4] for i in range(len(data)))
        assert len(data) == size
        chunks.append(data)
        at += 8 + packed
    return chunks


def unpack_lz4(frame: bytes) -> bytes:
    """The content of an LZ4 frame."""
    flags, out = frame[4], bytearray()
    at = 7 + 8 * bool(flags & 0x08)
    while size := int.from_bytes(frame[at : at + 4], "little"):
        raw, size = size >> 31, size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + size]
        at += 4 + size + 4 * bool(flags & 0x10)
        if raw:
            out += block
        else:
            unpack_block(block, out)
    return bytes(out)


def unpack_block(block: bytes, out: bytearray) -> None:
    """Literals, then a copy of what was there already, and so on; the last part has literals only."""

    def length(count: int, at: int) -> tuple[int, int]:
        if count == 15:
            more = 255
            while more == 255:
                more, at = block[at], at + 1
                count += more
        return count, at

    at = 0
    while at < len(block):
        token, at = block[at], at + 1
        literals, at = length(token >> 4, at)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        offset, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        copied, at = length(token & 15, at)
        for _ in range(copied + 4):
            out.append(out[-offset])


def read_shard(body: bytes, xorbs: dict[bytes, list[bytes]]) -> list[bytes]:
    """The contents of the files that it registers."""
    files, at = [], 48
    while body[at : at + 32] != b"\xff" * 32:
        flags, entries = struct.unpack_from("<II", body, at + 32)
        content = b""
        for entry in range(entries):
            start = at + 48 * (1 + entry)
            first, last = struct.unpack_from("<II", body, start + 40)
            content += b"".join(xorbs[body[start : start + 32]][first:last])
        files.append(content)
        at += 48 * (1 + entries * (2 if flags >> 31 else 1) + (flags >> 30 & 1))
    return files
