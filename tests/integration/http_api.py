# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A real HTTP server that answers as a test wants it to, down to the bytes on the wire."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Bytes as they are on the wire; or pieces of them with seconds to wait between, after which the connection is closed.
Wire = bytes | Iterator[bytes | float]


@dataclass
class Request:
    """``number`` counts from 1; ``query`` has the last value of each name."""

    number: int
    path: str
    query: dict[str, str]
    headers: Any


class Api:
    """``answer`` is called for each request; ``requests`` are those that came."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Callable[[Request], Wire] = lambda request: reply({"vms": []})
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urllib.parse.urlsplit(self.path)
                query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
                api.requests.append(Request(len(api.requests) + 1, parts.path, query, self.headers))
                wire = api.answer(api.requests[-1])
                # The client may be gone: that is what some tests are about.
                with contextlib.suppress(OSError):
                    if isinstance(wire, bytes):
                        self.wfile.write(wire)
                        return
                    self.close_connection = True
                    for piece in wire:
                        if isinstance(piece, bytes):
                            self.wfile.write(piece)
                            self.wfile.flush()
                        else:
                            time.sleep(piece)

            def log_message(self, *_args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # A client that hangs up is what some tests are about, and no news.
        setattr(self._server, "handle_error", lambda *_args: None)  # noqa: B010
        self.url = "http://127.0.0.1:%d/v1/vms" % self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def head(status: int = 200, **headers: object) -> bytes:
    """Return status line and headers; ``Content_Type`` stands for Content-Type."""
    fields = {"Content_Type": "application/json", **headers}
    lines = ["%s: %s" % (name.replace("_", "-"), value) for name, value in fields.items() if value is not None]
    return "\r\n".join(["HTTP/1.1 %d Some reason" % status, *lines, "", ""]).encode()


def reply(body: object, status: int = 200, **headers: object) -> bytes:
    """Return a whole answer; what is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(status, **{"Content_Length": len(data), **headers}) + data
