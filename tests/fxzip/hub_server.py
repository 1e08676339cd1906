"""A stand-in for the hub's API: a local server that keeps repositories in memory, as far as fxzip and its users ask."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_stand_in"
Files = dict[str, bytes]


class Hub:
    """Repositories: commits by their hashes, and which of them a branch is at."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.sizes: dict[str, int] = {}
        """Sizes that are told instead of the files' own."""
        self.url = ""

    def commit(self, repository: str, branch: str, files: Files) -> str:
        """Add files to a branch."""
        kept = self.commits.setdefault(repository, {})
        at = self.branches.setdefault(repository, {})
        new = {**kept.get(at.get(branch, ""), {}), **files}
        digest = hashlib.sha1(repr((branch, len(kept), sorted(new.items()))).encode()).hexdigest()
        kept[digest] = new
        at[branch] = digest
        return digest

    def files(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """The commit of a revision, and its files."""
        commits = self.commits.get(repository, {})
        digest = self.branches.get(repository, {}).get(revision, revision)
        return (digest, commits[digest]) if digest in commits else None


@contextmanager
def running() -> Iterator[Hub]:
    """The server, on a port of its own."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        length = headers.pop("Content_Length", str(len(body)))
        for key, value in {**headers, "Content_Length": length}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        owner, name, _, revision, file = [*path.strip("/").split("/", 4), "", "", "", ""][:5]
        repository = f"{owner}/{name}"
        if repository not in self.hub.commits:
            return self._send(404, X_Error_Code="RepoNotFound")
        found = self.hub.files(repository, revision)
        if found is None:
            return self._send(404, X_Error_Code="RevisionNotFound")
        digest, files = found
        if file not in files:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=digest)
        body = files[file]
        size = str(self.hub.sizes.get(file, len(body)))
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self._send(200, body, X_Repo_Commit=digest, ETag=etag, Content_Length=size)

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "log in"}, 401)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name in self.hub.commits:
                return self._json({"error": "it exists", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.commit(name, "main", {".gitattributes": b""})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        _, _, owner, name, verb, branch = path.strip("/").split("/")
        repository = f"{owner}/{name}"
        if verb == "branch":
            at = self.hub.branches[repository]
            at.setdefault(branch, at["main"])
            return self._json({})
        if verb == "preupload":
            each = json.loads(body)["files"]
            rows = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in each
            ]
            return self._json({"files": rows})
        assert verb == "commit", path
        rows = [json.loads(line) for line in body.splitlines()]
        new = {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
        digest = self.hub.commit(repository, branch, new)
        url = f"{self.hub.url}/{repository}/commit/{digest}"
        return self._json({"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})
