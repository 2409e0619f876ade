"""A stand-in for the Hugging Face hub on this machine: what its client calls to publish a model.

It keeps what it is sent, checks what the hub checks of it (tokens, rights, hashes, sizes, the head
of a card), and fails as it is told to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SIGNATURE = "X-Amz-Signature=5f3a9cunguessable"  # as addresses of a store have it
WRITER, READER, STRANGER = ("hf_" + letter * 30 for letter in "WRS")
LATE_SECONDS = 15.0
ERROR_CODES = ("RepoNotFound",)  # that the client tells apart
REPOSITORY = r"/(?P<repository>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """What the hub has of one, and who may write there."""

    owner: str
    private: bool = True
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"* lfs\n"})
    commits: list[str] = field(default_factory=list)  # their messages

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD path" holds a pattern.

    Attributes:
        kind: a status; "hang": no answer; "late": one after LATE_SECONDS; "drop": the connection
            ends in the middle of the body.
        times: how often.
    """

    pattern: str
    kind: int | str
    times: int = 1_000_000
    message: str = "told to fail"


@dataclass(frozen=True)
class Seen:
    """A request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class HubServer:
    """The stand-in; use it in a `with` block.

    Attributes:
        repositories: by OWNER/NAME.
        objects: large files by their SHA-256.
        part_bytes: of a large file in several parts; None: each in one.
        seen: the requests, in their order.
        faults: which of them fail.
    """

    def __init__(self) -> None:
        self.tokens = {WRITER: ("me", "write"), READER: ("me", "read"), STRANGER: ("she", "write")}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_bytes: int | None = None
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.is_closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                server.answer(self)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        self._http.shutdown()
        self._http.server_close()

    def paths(self, pattern: str) -> list[str]:
        """The requests that hold a pattern, as "METHOD path"."""
        return [str(seen) for seen in self.seen if re.search(pattern, str(seen))]

    def write_to(self, repository: str, folder: Path) -> Path:
        """Writes what a repository holds into a new folder."""
        for name, content in self.repositories[repository].files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Reads a request and answers it, or fails as told."""
        length = int(request.headers.get("Content-Length") or 0)
        fault = self._fault(f"{request.command} {request.path}")
        if fault and fault.kind == "drop":
            request.rfile.read(length // 2)
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        body = request.rfile.read(length)
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _read_chunks(request)
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = Seen(request.command, request.path, headers, body)
        with self.lock:
            self.seen.append(seen)
        if fault and fault.kind == "hang":
            self.is_closing.wait(60)
            request.close_connection = True
            return
        if fault and fault.kind == "late":
            self.is_closing.wait(LATE_SECONDS)
            fault = None
        if fault:
            status, content = int(fault.kind), {"error": fault.message}
            extra = {"X-Error-Code": fault.message} if fault.message in ERROR_CODES else {}
        else:
            with self.lock:
                status, content, extra = self._route(seen)
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        for name, value in extra.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    def _fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def _route(self, seen: Seen) -> tuple[int, Any, dict[str, str]]:
        path = unquote(urlsplit(seen.path).path)
        if path.startswith("/store/"):
            return self._store(seen, path)
        token = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self.tokens:
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        user, role = self.tokens[token]
        routes: list[tuple[str, Callable[..., tuple[int, Any, dict[str, str]]]]] = [
            ("GET /api/whoami-v2", self._whoami),
            ("POST /api/validate-yaml", self._validate),
            ("POST /api/repos/create", self._create),
            (f"GET /api/models{REPOSITORY}/auth-check/write", self._may_write),
            (f"GET /api/models{REPOSITORY}/tree/main", self._tree),
            (f"GET /api/models{REPOSITORY}(/revision/main)?", self._info),
            (f"POST /api/models{REPOSITORY}/preupload/main", self._preupload),
            (f"POST {REPOSITORY}.git/info/lfs/objects/batch", self._batch),
            (f"POST /api/models{REPOSITORY}/commit/main", self._commit),
        ]
        for pattern, act in routes:
            if found := re.fullmatch(pattern, f"{seen.method} {path}"):
                name = found.groupdict().get("repository")
                if name is None:
                    return act(seen, user, role)
                repository = self.repositories.get(name)
                if repository is None or (repository.private and repository.owner != user):
                    return 404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"}
                if seen.method != "GET" and (repository.owner != user or role == "read"):
                    return 403, {"error": "You may not write here"}, {}
                return act(seen, user, role, name, repository)
        return 404, {"error": f"the stand-in knows no {seen}"}, {}

    # ------------------------------------------------------------------------------- what it does

    def _whoami(self, seen: Seen, user: str, role: str) -> tuple[int, Any, dict[str, str]]:
        token = {"displayName": "t", "role": role}
        return 200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": token}}, {}

    def _validate(self, seen: Seen, user: str, role: str) -> tuple[int, Any, dict[str, str]]:
        """Which keys of the head must be what, as far as a card of ours has them."""
        head = json.loads(seen.body)["content"].split("---\n")
        try:
            matter = yaml.safe_load(head[1])
        except (yaml.YAMLError, IndexError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        lists, texts = ("datasets",), ("library_name", "pipeline_tag", "base_model", "license")
        wrong = [key for key in lists if not isinstance(matter.get(key, []), list)]
        wrong += [key for key in texts if not isinstance(matter.get(key, ""), str)]
        errors = [{"message": f'"{key}" is of the wrong type'} for key in wrong]
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _create(self, seen: Seen, user: str, role: str) -> tuple[int, Any, dict[str, str]]:
        wish = json.loads(seen.body)
        owner = wish["organization"] or user
        name = f"{owner}/{wish['name']}"
        if owner != user or role == "read":
            return 403, {"error": f"You have no rights below {owner}"}, {}
        if name in self.repositories:
            return 409, {"error": "You already created this", "url": f"{self.url}/{name}"}, {}
        self.repositories[name] = Repository(owner, wish.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}", "name": name}, {}

    def _may_write(
        self, seen: Seen, user: str, role: str, name: str, repository: Repository
    ) -> tuple[int, Any, dict[str, str]]:
        if repository.owner != user or role == "read":
            return 403, {"error": "You may not write here"}, {}
        return 200, {}, {}

    def _tree(
        self, seen: Seen, user: str, role: str, name: str, repository: Repository
    ) -> tuple[int, Any, dict[str, str]]:
        files = repository.files.items()
        return 200, [_entry(path, content) for path, content in files], {}

    def _info(
        self, seen: Seen, user: str, role: str, name: str, repository: Repository
    ) -> tuple[int, Any, dict[str, str]]:
        siblings = [{"rfilename": path} for path in repository.files]
        info = {"id": name, "private": repository.private, "sha": repository.sha}
        return 200, info | {"siblings": siblings, "downloads": 0, "tags": []}, {}

    def _preupload(
        self, seen: Seen, user: str, role: str, name: str, repository: Repository
    ) -> tuple[int, Any, dict[str, str]]:
        answers = []
        for file in json.loads(seen.body)["files"]:
            is_large = _is_large(file["path"])
            there = repository.files.get(file["path"])
            oid = None if there is None else (_sha256 if is_large else _git_hash)(there)
            mode = "lfs" if is_large else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        return 200, {"files": answers}, {}

    def _batch(
        self, seen: Seen, user: str, role: str, name: str, repository: Repository
    ) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for wish in json.loads(seen.body)["objects"]:
            oid, size = wish["oid"], wish["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                href = f"{self.url}/store/{oid}?{SIGNATURE}"
                header = {}
                if self.part_bytes:
                    count = -(-size // self.part_bytes)
                    header = {str(n): f"{href}&part={n}" for n in range(1, count + 1)}
                    header["chunk_size"] = str(self.part_bytes)
                verify = {"href": f"{self.url}/store/{oid}/verify", "header": {}}
                entry["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(entry)
        kind = "multipart" if self.part_bytes else "basic"
        return 200, {"transfer": kind, "objects": objects}, {}

    def _store(self, seen: Seen, path: str) -> tuple[int, Any, dict[str, str]]:
        """The store of large files: whole ones, parts, their end, and whether they are there."""
        oid, query = path.split("/")[2], parse_qs(urlsplit(seen.path).query)
        if path.endswith("/verify"):
            size = json.loads(seen.body)["size"]
            is_there = len(self.objects.get(oid, b"")) == size
            return (200 if is_there else 404), {}, {}
        if seen.method == "PUT" and "part" in query:
            number = int(query["part"][0])
            self.parts[oid, number] = seen.body
            return 200, {}, {"ETag": f'"{number}"'}
        content = seen.body
        if seen.method == "POST":
            numbers = [part["partNumber"] for part in json.loads(seen.body)["parts"]]
            content = b"".join(self.parts[oid, number] for number in numbers)
        if _sha256(content) != oid:
            return 400, {"error": "the content is not what was announced"}, {}
        self.objects[oid] = content
        return 200, {}, {}

    def _commit(
        self, seen: Seen, user: str, role: str, name: str, repository: Repository
    ) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in seen.body.splitlines()]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.objects:
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"a commit cannot hold {line}"}, {}
        repository.files = files
        repository.commits.append(lines[0]["value"]["summary"])
        url = f"{self.url}/{name}/commit/{repository.sha}"
        return 200, {"success": True, "commitOid": repository.sha, "commitUrl": url}, {}


class _QuietServer(ThreadingHTTPServer):
    """One whose clients may leave in the middle of a request, as they are meant to here."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _read_chunks(request: BaseHTTPRequestHandler) -> bytes:
    """A body whose length nobody has told."""
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if _is_large(path):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry | {"oid": _git_hash(content)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
