"""A stand-in for the Hugging Face Hub: what its client needs to make a model, commit to it, list it and read files.

Files ending in .safetensors go through Git LFS, as on the Hub; nothing is written to disk.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """What the server holds."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # by repository
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)  # all files, after each commit
    objects: dict[str, bytes] = field(default_factory=dict)  # by sha256, of LFS
    requests: list[str] = field(default_factory=list)

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the name of a commit and its files."""
        for number, files in reversed(list(enumerate(self.commits.get(repository, [])))):
            sha = hashlib.sha1(f"{repository} {number}".encode()).hexdigest()
            if revision in ("main", sha):
                return sha, files
        return None


def entry(path: str, content: bytes) -> dict[str, Any]:
    """Describe a file as the Hub's tree does."""
    digest = hashlib.sha256(content).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
    if path.endswith(".safetensors"):
        found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return found


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        path, body = unquote(self.path.partition("?")[0]), self.body()
        self.hub.requests.append(f"{self.command} {path}")
        if self.command == "PUT" and path.startswith("/lfs/"):
            digest = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == digest
            self.hub.objects[digest] = body
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+).*)?", path):
            self.of_model(found[1], found[2] or "revision", found[3] or "main", body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}} for each in asked
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            self.file(*found.groups())
        else:
            self.answer({"error": f"not known here: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        answer = {"url": f"{self.hub.address}/{name}", "id": name, "name": name}
        if name in self.hub.commits:
            self.answer(answer | {"error": "You already created this model repo"}, 409)
            return
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.commits[name], self.hub.private[name] = [{}], is_private
        self.answer(answer)

    def of_model(self, name: str, what: str, revision: str, body: bytes) -> None:
        commit = self.hub.at(name, revision)
        if commit is None:
            code = "RepoNotFound" if name not in self.hub.commits else "RevisionNotFound"
            self.answer({"error": "not found"}, 404, X_Error_Code=code)
            return
        sha, files = commit
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            facts = {"private": self.hub.private[name], "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
            self.answer({"id": name, "modelId": name, "sha": sha, **facts})
        elif what == "tree":
            self.answer([entry(path, content) for path, content in files.items()])
        elif what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", body.decode())
            self.answer([entry(path, files[path]) for path in map(unquote, asked) if path in files])
        elif what == "preupload":
            asked = json.loads(body)["files"]
            modes = {each["path"]: "lfs" if each["path"].endswith(".safetensors") else "regular" for each in asked}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif what == "commit":
            after = dict(files)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    after[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    after[value["path"]] = self.hub.objects[value["oid"]]
            self.hub.commits[name].append(after)
            oid = self.hub.at(name, "main")
            assert oid is not None
            self.answer({"commitOid": oid[0], "commitUrl": f"{self.hub.address}/{name}/commit/{oid[0]}"})

    def file(self, name: str, revision: str, path: str) -> None:
        commit = self.hub.at(name, revision)
        content = None if commit is None else commit[1].get(path)
        if commit is None or content is None:
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            span = f"bytes {start}-{end}/{len(content)}"
            self.answer(content[start : end + 1], 206, ETag=etag, Content_Range=span, X_Repo_Commit=commit[0])
            return
        self.answer(content, ETag=etag, X_Repo_Commit=commit[0], X_Linked_Size=str(len(content)))


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve on a port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
