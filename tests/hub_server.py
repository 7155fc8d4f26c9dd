# SPDX-License-Identifier: Apache-2.0
"""A small Hub on the loopback address: what the real client asks for when it downloads and when it publishes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml

CUT = "cut"
Fault = Callable[["Handler"], "int | str | None"]
"""Given a request before it is answered: a status to answer with, ``CUT`` to drop the connection, or None."""


@dataclass
class Commit:
    """A commit of a repository.

    Attributes:
        files: Everything in it, by path.
        message: Its first line.
        parent: The one before.
    """

    files: dict[str, bytes]
    message: str
    parent: str | None


@dataclass
class Repository:
    """A repository.

    Attributes:
        private: Whether only its owner may read it.
        commits: By their hash.
        branches: Their last commits, pull requests included.
    """

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, bytes], branch: str = "main", message: str = "by hand", sha: str = "") -> str:
        """A commit after the last one of a branch; its hash."""
        sha = sha or hashlib.sha1(f"{message} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(files, message, self.branches.get(branch))
        self.branches[branch] = sha
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What is in the last commit of a branch."""
        return self.commits[self.branches[branch]].files

    def history(self, branch: str = "main") -> list[str]:
        """The messages of a branch's commits, the last one first."""
        messages, sha = [], self.branches.get(branch)
        while sha is not None:
            messages.append(self.commits[sha].message)
            sha = self.commits[sha].parent
        return messages

    def find(self, revision: str) -> str | None:
        """The hash of a branch or commit."""
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None


class Hub(ThreadingHTTPServer):
    """Repositories, and what was asked for.

    Attributes:
        repositories: By their id.
        writers: Tokens that may write, with the owner of each.
        readers: Tokens that may only read.
        stored: Large files that arrived, by their hash; in a repository once a commit names them.
        sent: Their hashes, in the order they arrived.
        requests: Method and path of every request.
        asked: Method, file and range of each request for a file.
        created: What each repository was asked for with.
        faults: Looked at before each request is answered.
        without_ranges: Whether parts of files are refused.
        storage: The address that large files are to be sent to.
        large_files: Whether weights go by the way of large files, and not in the commit.
        part_bytes: Large files are to be sent in parts of so many bytes.
        unexpected: Errors of the server itself.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.writers = {"hf_writer": "some"}
        self.readers = {"hf_reader"}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.sent: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.asked: list[tuple[str, str, str | None]] = []
        self.created: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.without_ranges = False
        self.storage = f"{self.address}/storage"
        self.large_files = True
        self.part_bytes: int | None = None
        self.unexpected: list[BaseException] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repo_id: str, folder: Path, sha: str = "") -> Repository:
        """A repository with the files of a folder."""
        self.repositories[repo_id] = repository = Repository()
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository.add(files, sha=sha)
        return repository

    def downloads(self) -> dict[str, int]:
        """How often each safetensors file was fetched whole."""
        counts: dict[str, int] = {}
        for method, file, part in self.asked:
            if method == "GET" and file.endswith(".safetensors") and part is None:
                counts[file] = counts.get(file, 0) + 1
        return counts

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):  # clients may go
            self.unexpected.append(error)


@contextmanager
def served() -> Iterator[Hub]:
    """A Hub that answers inside the ``with``, and has met nothing that it does not know."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
    assert hub.unexpected == []


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are sent apart, and the second would wait for 40 ms

    def handle_one_request(self) -> None:
        self.body: bytes | None = None
        super().handle_one_request()

    def do_GET(self) -> None:
        self.url = urlparse(self.path)
        self.server.requests.append((self.command, self.url.path))
        for fault in self.server.faults:
            answer = fault(self)
            if answer == CUT:
                self._cut()
                return
            if answer is not None and (int(answer) >= 500 or self.command == "PUT"):  # not by the Hub itself
                headers = {"Content-Type": "text/html", "X-Request-Id": "Root=1-5f2a"}
                self.answer(int(answer), b"<html>this was arranged</html>", headers)
                return
            if answer is not None:
                self.refuse(int(answer), "this was arranged")
                return
        for pattern, act in self._routes.items():
            method, _, path = pattern.partition(" ")
            if self.command in method.split("|") and (match := re.fullmatch(path, self.url.path)):
                act(self, *map(unquote, match.groups()))
                return
        self.refuse(404, "no such page")

    do_HEAD = do_POST = do_PUT = do_GET

    # -- reading

    def info(self, repo_id: str, revision: str = "main") -> None:
        if found := self._readable(repo_id, revision):
            repository, sha = found
            self.json({"id": repo_id, "sha": sha, "siblings": [], "tags": [], "private": repository.private})

    def tree(self, repo_id: str, revision: str) -> None:
        if found := self._readable(repo_id, revision):
            repository, sha = found
            self.json([_listed(path, data) for path, data in sorted(repository.commits[sha].files.items())])

    def folder(self, repo_id: str, revision: str, path: str) -> None:
        self.refuse(404, f"{path} does not exist", {"X-Error-Code": "EntryNotFound"})

    def file(self, repo_id: str, revision: str, path: str) -> None:
        part = self.headers.get("Range")
        self.server.asked.append((self.command, path, part))
        found = self._readable(repo_id, revision)
        if not found:
            return
        repository, sha = found
        data = repository.commits[sha].files.get(path)
        if data is None:
            self.refuse(404, "no such file", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        headers = {"ETag": f'"{_sha256(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if part and self.server.without_ranges:
            self.answer(416, b"", headers)
        elif part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            self.answer(206, data[int(first) : end], headers)
        else:
            self.answer(200, data, headers)

    def _readable(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision, or None where the refusal was sent."""
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and self._owner() is None):
            self.refuse(404 if self._token() else 401, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return None
        sha = repository.find(revision)
        if sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, sha

    # -- writing

    def create(self) -> None:
        wanted = self.read_json()
        if self._may_write() is None:
            return
        self.server.created.append(wanted)
        repo_id = f"{wanted.get('organization') or self._owner()}/{wanted['name']}"
        address = {"url": f"{self.server.address}/{repo_id}"}
        if repo_id in self.server.repositories:
            self.json({"error": "You already created this model repo", **address}, 409)
            return
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repositories[repo_id] = repository = Repository(private=private)
        begin = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        repository.add(begin, message="initial commit")
        self.json(address)

    def create_branch(self, repo_id: str, branch: str) -> None:
        wanted = self.read_json()
        if self._may_write() is None:
            return
        repository = self.server.repositories[repo_id]
        start = repository.find(wanted.get("startingPoint", "main"))
        if start is None or branch.startswith("refs/"):
            self.refuse(400, f"Invalid reference for a branch: {branch}")
            return
        repository.branches[branch] = start
        self.json({})

    def validate(self) -> None:
        content = self.read_json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            values = yaml.safe_load(match[1]) if match else {}
            errors = [] if isinstance(values.get("tags", []), list) else [{"message": '"tags" must be an array'}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error).splitlines()[0]}]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        asked = self.read_json()["files"]
        if self._may_write() is None or not (found := self._readable(repo_id, revision)):
            return
        repository, sha = found
        there = repository.commits[sha].files
        self.json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if self.server.large_files and _is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": _object_id(file["path"], there[file["path"]]) if file["path"] in there else None,
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, repo_id: str) -> None:
        asked = self.read_json()
        if self._may_write() is None:
            return
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        self.json({"transfer": "basic", "objects": [self._upload(wanted) for wanted in asked["objects"]]})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to send a large file; nothing for one that is here."""
        oid, size, part = wanted["oid"], wanted["size"], self.server.part_bytes
        if oid in self.server.stored:
            return {"oid": oid, "size": size}
        place = f"{self.server.storage}/{oid}"
        verify = f"{self.server.address}/storage/{oid}/verify"
        upload: dict[str, Any] = {"href": place}
        if part is not None:
            numbers = range(1, -(-size // part) + 1)
            upload = {
                "href": f"{place}/complete",
                "header": {"chunk_size": str(part), **{str(n): f"{place}/{n}" for n in numbers}},
            }
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": verify}}}

    def store(self, oid: str) -> None:
        self._arrived(oid, self.read())

    def store_part(self, oid: str, number: str) -> None:
        data = self.read()
        assert self.server.part_bytes is not None and len(data) <= self.server.part_bytes
        self.server.parts.setdefault(oid, {})[int(number)] = data
        self.answer(200, b"", {"ETag": f'"{_sha256(data)}"'})

    def complete(self, oid: str) -> None:
        parts = self.server.parts[oid]
        named = {part["partNumber"]: part["etag"] for part in self.read_json()["parts"]}
        assert named == {number: f'"{_sha256(data)}"' for number, data in parts.items()}
        self._arrived(oid, b"".join(parts[number] for number in sorted(parts)))

    def _arrived(self, oid: str, data: bytes) -> None:
        if _sha256(data) != oid:
            self.refuse(400, "the file has another hash")
            return
        self.server.stored[oid] = data
        self.server.sent.append(oid)
        self.answer(200, b"", {})

    def verify(self, oid: str) -> None:
        asked = self.read_json()
        here = self.server.stored.get(oid)
        if here is None or len(here) != asked["size"]:
            self.refuse(404, "it has not arrived")
            return
        self.json({})

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read().splitlines()]
        if self._may_write() is None or not (found := self._readable(repo_id, revision)):
            return
        repository, sha = found
        header, operations = lines[0]["value"], lines[1:]
        if header.get("parentCommit", sha) != sha:
            self.refuse(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(repository.commits[sha].files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in self.server.stored:
                files[path] = self.server.stored[value["oid"]]
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                self.refuse(400, f"{kind} {path}: there is no such file")
                return
        pull_request = "create_pr" in parse_qs(self.url.query)
        branch = f"refs/pr/{len(repository.branches)}" if pull_request else revision
        if pull_request:
            repository.branches[branch] = sha
        sha = repository.add(files, branch, header["summary"])
        place = f"{self.server.address}/{repo_id}"
        self.json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{place}/commit/{sha}",
                "pullRequestUrl": f"{place}/discussions/{branch.rpartition('/')[2]}" if pull_request else None,
            }
        )

    def _token(self) -> str | None:
        value = self.headers.get("Authorization")
        return None if value is None else value.removeprefix("Bearer ")

    def _owner(self) -> str | None:
        return self.server.writers.get(self._token() or "")

    def _may_write(self) -> str | None:
        """Who asks, or None where the refusal was sent."""
        owner = self._owner()
        if owner is not None:
            return owner
        if self._token() in self.server.readers:
            self.refuse(403, "You don't have the rights to write here")
        elif self._token() is None:
            self.refuse(401, "Invalid username or password.")
        else:
            message = "Invalid credentials in Authorization header"
            self.refuse(401, message, {"X-Error-Message": message})
        return None

    # -- plumbing

    def read(self) -> bytes:
        """The body of the request."""
        if self.body is None:
            assert "Transfer-Encoding" not in self.headers
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.body

    def read_json(self) -> Any:
        return json.loads(self.read())

    def refuse(self, code: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.json({"error": message}, code, headers)

    def json(self, values: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(code, json.dumps(values).encode(), {"Content-Type": "application/json", **(headers or {})})

    def answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.read()  # else it would be taken for the next request
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _cut(self) -> None:
        """Take half of what comes, and hang up."""
        if self.body is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass

    _id = "([^/]+/[^/]+)"
    _routes: dict[str, Callable[..., None]] = {  # noqa: RUF012
        f"GET|HEAD /{_id}/resolve/([^/]+)/(.+)": file,
        f"GET /api/models/{_id}/tree/([^/]+)": tree,
        f"GET /api/models/{_id}/tree/([^/]+)/(.+)": folder,
        f"GET /api/models/{_id}": info,
        f"GET /api/models/{_id}/revision/([^/]+)": info,
        "POST /api/repos/create": create,
        f"POST /api/models/{_id}/branch/([^/]+)": create_branch,
        "POST /api/validate-yaml": validate,
        f"POST /api/models/{_id}/preupload/([^/]+)": preupload,
        f"POST /{_id}.git/info/lfs/objects/batch": batch,
        "PUT /storage/([0-9a-f]+)": store,
        "PUT /storage/([0-9a-f]+)/([0-9]+)": store_part,
        "POST /storage/([0-9a-f]+)/complete": complete,
        "POST /storage/([0-9a-f]+)/verify": verify,
        f"POST /api/models/{_id}/commit/([^/]+)": commit,
    }


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _object_id(path: str, data: bytes) -> str:
    return _sha256(data) if _is_large(path) else _git_hash(data)


def _listed(path: str, data: bytes) -> dict[str, Any]:
    large = {"oid": _sha256(data), "size": len(data), "pointerSize": 130} if _is_large(path) else None
    return {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data), "lfs": large}
