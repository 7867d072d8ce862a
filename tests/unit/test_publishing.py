# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is published of the end of VMs, to real servers that behave and that do not."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import publishing

SECRET = "hunter2-of-the-hook"


def token(vm_id, evidence="absent"):
    return {"vm_id": vm_id, "evidence": evidence, "kind": "jail", "name": vm_id}


def plan(*tokens, refused=None):
    return {"reap": list(tokens), "refused": refused}


def test_what_is_published_is_what_goes():
    plans = {
        "one": plan(token("v2", "tombstoned"), token("v1"), token("v1"), token("v3")),
        "two": plan(token("v4")),
        "three": plan(token("v5")),
        "four": plan(token("v6"), refused={"code": "stale"}),
        "five": plan(),
        "six": None,
        "eight": plan(dict(token("v9"), since=5.0)),
        "seven": plan({"vm_id": "v8", "evidence": None}, token("v8", "elsewhere")),
    }
    found = publishing.ended(plans, {"three": {"code": "x"}}, {"one": {"v3": "it lives"}, "two": {"v4": "it lives"}})
    assert found == {
        "one": [
            {"vm_id": "v1", "evidence": "absent", "resources": 2},
            {"vm_id": "v2", "evidence": "tombstoned", "resources": 1},
        ],
        "seven": [{"vm_id": "v8", "evidence": "elsewhere", "resources": 2}],
    }
    assert publishing.document("prod", "run-1", found) == {
        "event": "vm_ended", "realm": "prod", "sweep": "run-1", "check_mode": False, "hosts": found,
    }  # fmt: skip


class Hook:
    """A server that answers each request with the next status of ``answers``, the last one for ever."""

    def __init__(self, *answers, pause=0.0):
        hook = self
        self.answers, self.seen = list(answers), []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.seen.append((self.path, dict(self.headers), json.loads(body)))
                time.sleep(pause)
                self.send_response(hook.answers.pop(0) if len(hook.answers) > 1 else hook.answers[0])
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_arguments):
                """Be quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d/hooks/%s?key=%s" % (self.server.server_port, SECRET, SECRET)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_exception):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(publishing, "PAUSE", 0.01)


def post(url, headers=None, timeout=5):
    said = publishing.post(url, {"event": "vm_ended"}, headers=headers or {}, timeout=timeout)
    assert SECRET not in str(said)
    return said


def test_the_body_is_json_and_the_headers_come_along():
    with Hook(204) as hook:
        assert post(hook.url, {"Authorization": "Bearer " + SECRET, "X-Number": 5}) is None
    ((path, headers, body),) = hook.seen
    assert path == "/hooks/%s?key=%s" % (SECRET, SECRET)
    assert (headers["Authorization"], headers["X-Number"]) == ("Bearer " + SECRET, "5")
    assert headers["Content-Type"] == "application/json"
    assert body == {"event": "vm_ended"}


@pytest.mark.parametrize(
    ("answers", "asked", "said"),
    [
        ([503, 200], 2, None),
        ([500], 2, "HTTP 500"),
        ([429], 2, "HTTP 429"),
        ([403], 1, "HTTP 403"),
        ([302], 1, "it leads elsewhere, and is not followed"),
    ],
)
def test_it_is_asked_once_more_where_that_may_help(answers, asked, said):
    with Hook(*answers) as hook:
        found = post(hook.url)
    assert len(hook.seen) == asked
    assert found is None if said is None else said in found and found.startswith("POST http://127.0.0.1:")


def test_a_hook_that_does_not_answer_costs_two_tries():
    begin = time.monotonic()
    with Hook(200, pause=5) as hook:
        assert "no answer" in post(hook.url, timeout=0.3)
    assert time.monotonic() - begin < 1.5 and len(hook.seen) == 2


def test_an_answer_that_drips_in_costs_no_more():
    server = socket.create_server(("127.0.0.1", 0))

    def drip():
        while True:
            try:
                client = server.accept()[0]
            except OSError:
                return
            threading.Thread(target=dribble, args=(client,), daemon=True).start()

    def dribble(client):
        try:
            client.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            for _second in range(100):
                client.sendall(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    begin = time.monotonic()
    assert "no answer within 0.5 s" in post("http://127.0.0.1:%d/%s" % (server.getsockname()[1], SECRET), timeout=0.5)
    assert time.monotonic() - begin < 2
    server.close()


def test_what_cannot_be_asked_is_said_without_the_secret():
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    assert "Connection refused" in post("http://user:%s@127.0.0.1:%d/%s" % (SECRET, port, SECRET))
    assert "could not be asked" in post("http://127.0.0.1:%d/" % port, {"X-Token": SECRET + "\nX-Other: 1"})
    for wrong in ("ftp://x/y", "control.example/hook", "http://", "http://[x", "http://x:port/"):
        assert post(wrong) == "reap_webhook_url is no URL of http or https"
