"""A stand-in for the Hugging Face Hub with the parts of its HTTP API that the client uses.

Repositories are kept in memory, with the files of each commit by branch and by id. Files that a client sends by LFS go
through the batch endpoint and a separate upload, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"


class Hub:
    """The state of the server."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = ""

    def commit(self, name: str, changed: dict[str, bytes]) -> str:
        repository = self.repositories[name]
        files = {**repository["commits"].get(repository["main"], {}), **changed}
        sha = hashlib.sha1(repr((repository["main"], sorted(files))).encode()).hexdigest()
        repository["commits"][sha], repository["main"] = files, sha
        return sha

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repositories[name]
        sha = repository["main"] if revision == "main" else repository["tags"].get(revision, revision)
        return (sha, repository["commits"][sha]) if sha in repository["commits"] else None


@contextmanager
def served_hub() -> Iterator[Hub]:
    """Serve a Hub on a free local port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_range(self, content: bytes, **headers: str) -> None:
        """Send the whole content or the requested range."""
        if (found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")) is None:
            return self.answer(200, content, **headers)
        start, stop = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
        return self.answer(
            206, content[start : stop + 1], Content_Range=f"bytes {start}-{stop}/{len(content)}", **headers
        )

    def say(self, content: object, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def fault(self, status: int, code: str) -> None:
        self.answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

    def handle_request(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        writes = self.command in ("POST", "PUT")
        if writes and "/objects/upload/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fault(401, "RepoNotFound")
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, do in _ROUTES:
            if wanted == method and (found := re.fullmatch(pattern, path)):
                return do(self, *found.groups(), body)
        return self.fault(404, "EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.say(address, 409)
        private = asked.get("visibility") == "private"
        self.hub.repositories[name] = {"private": private, "commits": {}, "tags": {}, "main": ""}
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.say(address)

    def info(self, name: str, revision: str | None, _: bytes) -> None:
        if name not in self.hub.repositories:
            return self.fault(404, "RepoNotFound")
        found = self.hub.files(name, revision or "main")
        if found is None:
            return self.fault(404, "RevisionNotFound")
        files = [{"rfilename": file} for file in found[1]]
        return self.say({"id": name, "sha": found[0], "siblings": files, "private": False, "tags": []})

    def tree(self, name: str, revision: str, _: bytes, wanted: Callable[[str], bool] = bool) -> None:
        _, files = self.hub.files(name, revision)
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in files.items()
            if wanted(file)
        ]
        self.say(entries)

    def preupload(self, name: str, _revision: str, body: bytes) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = json.loads(body)["files"]
        self.say({"files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]})

    def batch(self, name: str, body: bytes) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/{name}/objects/upload/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.say({"transfer": "basic", "objects": objects})

    def upload(self, _name: str, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(200)

    def commit(self, name: str, _revision: str, body: bytes) -> None:
        changed = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.commit(name, changed)
        self.say({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, name: str, revision: str, file: str, _: bytes) -> None:
        if name not in self.hub.repositories:
            return self.fault(404, "RepoNotFound")
        found = self.hub.files(name, revision)
        if found is None:
            return self.fault(404, "RevisionNotFound")
        if file not in found[1]:
            return self.fault(404, "EntryNotFound")
        content = found[1][file]
        return self.answer_range(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=found[0])

    def paths_info(self, name: str, revision: str, body: bytes) -> None:
        asked = {unquote(value) for key, _, value in (part.partition("=") for part in body.decode().split("&"))
                 if key == "paths"}  # fmt: skip
        self.tree(name, revision, b"", lambda file: file in asked)

    def validate(self, _: bytes) -> None:
        self.say({"errors": [], "warnings": []})


_NAME = r"([\w.-]+/[\w.-]+)"
_KIND = r"/api/(?:models|datasets)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", rf"{_KIND}/{_NAME}(?:/revision/([\w.-]+))?", _Handler.info),
    ("GET", rf"{_KIND}/{_NAME}/tree/([\w.-]+)", _Handler.tree),
    ("POST", rf"{_KIND}/{_NAME}/paths-info/([\w.-]+)", _Handler.paths_info),
    ("POST", rf"/api/models/{_NAME}/preupload/([\w.-]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", rf"/{_NAME}/objects/upload/(\w+)", _Handler.upload),
    ("POST", rf"/api/models/{_NAME}/commit/([\w.-]+)", _Handler.commit),
    ("GET", rf"(?:/datasets)?/{_NAME}/resolve/([\w.-]+)/(.+)", _Handler.resolve),
]
