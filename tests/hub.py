"""A Hugging Face hub on loopback, for the real client: downloads and commits.

It serves folders as repositories, one commit each, over the hub's HTTP interface: repository info,
listings, and files with byte ranges. A repository may be gated: it then wants a token. With a token
that may write, repositories are made and committed to; weights come by Git LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_open_sesame"
READING_TOKEN = "hf_only_reads"


@dataclass
class Hub:
    """A running hub."""

    url: str
    folders: dict[str, Path]  # "models/owner/name" or "datasets/owner/name" -> its files
    gated: set[str] = field(default_factory=set)
    later: dict[str, Path] = field(default_factory=dict)  # of repositories whose main moved on
    sent: list[tuple[str, int]] = field(default_factory=list)  # (file, bytes) of each answer
    new: Path | None = None  # where the files of repositories are that a client makes
    private: dict[str, bool] = field(default_factory=dict)  # of these
    commits: list[list[str]] = field(default_factory=list)  # the files of each
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> what came by LFS


@contextmanager
def serve_hub(folders: dict[str, Path]) -> Iterator[Hub]:
    """Serve while the block runs."""
    hub = Hub("", folders)
    server = _Server(hub)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) < 4:  # the client asks for more than files
            self._error(404, "EntryNotFound")
            return
        if parts[0] == "api":
            kind, owner, name, *rest = parts[1:]
            if self._admitted(f"{kind}/{owner}/{name}"):
                self._api(f"{kind}/{owner}/{name}", rest)
            return
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        repo = f"{kind}/{parts[0]}/{parts[1]}"
        if self._admitted(repo) and self._known(parts[3]):
            self._file(*self._at(repo, parts[3]), "/".join(parts[4:]))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", kind, owner, name, "paths-info", revision]:
                self._paths(f"{kind}/{owner}/{name}", unquote(revision), body.decode())
            case [owner, repository, "info", "lfs", "objects", "batch"]:
                if self._may_write(f"models/{owner}/{repository.removesuffix('.git')}"):
                    objects = [self._upload(item) for item in json.loads(body)["objects"]]
                    self._json({"transfer": "basic", "objects": objects})
            case ["api", kind, owner, name, what, _]:
                if self._may_write(f"{kind}/{owner}/{name}"):
                    self._write(f"{kind}/{owner}/{name}", what, body)
            case _:
                self._error(404, "EntryNotFound")

    def _write(self, repo: str, what: str, body: bytes) -> None:
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [_mode(path) for path in paths]})
        elif what == "commit":
            self._commit(repo, body)
        else:
            self._error(404, "EntryNotFound")

    def _paths(self, repo: str, revision: str, asked: str) -> None:
        if self._admitted(repo) and self._known(revision):
            _, folder = self._at(repo, revision)
            found = [folder / path for path in parse_qs(asked)["paths"]]
            self._json([_entry(folder, path) for path in found if path.exists()])

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hub.blobs[self.path.rpartition("/")[2]] = content
        self._json({})

    def _may_write(self, repo: str | None) -> bool:
        token = self.headers.get("Authorization")
        if token not in (f"Bearer {TOKEN}", f"Bearer {READING_TOKEN}"):
            self._error(401, "")
        elif token == f"Bearer {READING_TOKEN}":
            self._error(403, "")
        elif repo is not None and repo not in self.server.hub.folders:
            self._error(404, "RepoNotFound")
        else:
            return True
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        hub, name = self.server.hub, f"{asked['organization']}/{asked['name']}"
        if not self._may_write(None):
            return
        if f"models/{name}" in hub.folders:
            self._answer(409, json.dumps({"url": f"{hub.url}/{name}"}).encode(), {})
            return
        assert hub.new is not None
        hub.folders[f"models/{name}"] = folder = hub.new / name
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._json({"url": f"{hub.url}/{name}", "name": name})

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        place = {"href": f"{self.server.hub.url}/blobs/{item['oid']}", "header": {}}
        return {**item, "actions": {"upload": place}}

    def _commit(self, repo: str, body: bytes) -> None:
        hub, written = self.server.hub, {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                written[value["path"]] = hub.blobs[value["oid"]]
        for name, content in written.items():
            target = hub.folders[repo] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        hub.commits.append(sorted(written))
        page = f"{hub.url}/{repo.partition('/')[2]}/commit/{LATER_COMMIT}"
        self._json({"success": True, "commitOid": LATER_COMMIT, "commitUrl": page})

    def _at(self, repo: str, revision: str) -> tuple[str, Path]:
        """The commit that a revision names, and its files."""
        later = self.server.hub.later.get(repo)
        if later is not None and revision in ("main", LATER_COMMIT):
            return LATER_COMMIT, later
        return COMMIT, self.server.hub.folders[repo]

    def _admitted(self, repo: str) -> bool:
        if repo not in self.server.hub.folders:
            self._error(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
            return False
        if repo in self.server.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(403, "GatedRepo")
            return False
        return True

    def _known(self, revision: str) -> bool:
        if revision in ("main", COMMIT, LATER_COMMIT):
            return True
        self._error(404, "RevisionNotFound")
        return False

    def _api(self, repo: str, rest: list[str]) -> None:
        if len(rest) > 1 and not self._known(rest[1]):
            return
        commit, folder = self._at(repo, rest[1] if len(rest) > 1 else "main")
        if not rest or rest[0] == "revision":
            self._json({"id": repo.partition("/")[2], "sha": commit, "siblings": []})
            return
        root = folder.joinpath(*rest[2:])
        if not root.is_dir():
            self._error(404, "EntryNotFound")
            return
        recursive = parse_qs(urlsplit(self.path).query)["recursive"][0].lower() == "true"
        found = root.rglob("*") if recursive else root.iterdir()
        self._json([_entry(folder, path) for path in sorted(found)])

    def _file(self, commit: str, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        content, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(path)}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        if self.command == "GET":
            self.server.hub.sent.append((name, len(content)))
        self._answer(status, content, headers)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _mode(path: str) -> dict[str, Any]:
    kind = "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
    return {"path": path, "uploadMode": kind, "shouldIgnore": False}


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _oid(Path(name))}
    size = path.stat().st_size
    found = {"type": "file", "path": name, "size": size, "oid": _oid(path)}
    if path.suffix == ".safetensors":
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found["lfs"] = {"oid": content, "size": size, "pointerSize": 134}
    return found


def _oid(path: Path) -> str:
    content = path.read_bytes() if path.is_file() else str(path).encode()
    return hashlib.sha1(content).hexdigest()
