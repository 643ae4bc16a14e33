"""An object store on loopback that answers whatever a test wants, for the real clients.

It holds keys that no honest store would have beside one another (`../`, empty parts), and notes
every request. It checks no signature.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class ObjectStore:
    """A running store of one bucket."""

    port: int
    objects: dict[str, bytes]  # key -> content
    requests: list[str] = field(default_factory=list)  # "GET /bucket/key?query"

    def uri(self, path: str) -> str:
        """What `path` (bucket and key) is called here."""
        options = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"
        return f"s3://{path}?{options}"


@contextmanager
def serve_objects(objects: dict[str, bytes]) -> Iterator[ObjectStore]:
    """Serve while the block runs; every bucket holds these objects."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.store = ObjectStore(server.server_address[1], objects)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    store: ObjectStore


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.store.requests.append(f"{self.command} {self.path}")
        place = urlsplit(self.path)
        key = unquote(place.path).removeprefix("/").partition("/")[2]
        query = parse_qs(place.query)
        if not key and "list-type" in query:
            self._answer(200, self._listing(query.get("prefix", [""])[0]))
        elif key in self.server.store.objects:
            self._answer(200, self.server.store.objects[key])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET

    def _listing(self, prefix: str) -> bytes:
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, content in self.server.store.objects.items()
            if key.startswith(prefix)
        )
        head = "<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>"
        return f"{head}{contents}</ListBucketResult>".encode()

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Last-Modified", _DATE)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
