# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tells a web hook which VMs have ended, before anything of them is removed: cleaning may take long.

What is told is what a plan is about to do and nothing spares. A VM of which something stays busy is told again by the
next sweep, so whoever listens must take an end that it knows for what it is.

No secret is in any error: neither headers nor the path or the query of the URL, which often is one.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.parse

from ansible.module_utils.urls import open_url

EVENT = "vm_ended"
TRIES = 2
PAUSE = 0.5
# Answers after which the same request may do better.
AGAIN = (408, 425, 429, 500, 502, 503, 504)


def ended(plans, refused, spare):
    """Return ``{host: [{vm_id, evidence, resources}]}`` of what the plans are about to remove, in order of ids.

    ``refused`` and ``spare``, ``{host: ...}`` and ``{host: {vm_id: why}}``, name what is left alone all the same.
    """
    found = {}
    for host, plan in sorted(plans.items()):
        if not plan or plan.get("refused") or host in refused:
            continue
        vms = {}
        for token in plan["reap"]:
            if token["vm_id"] in spare.get(host, {}) or "since" in token:
                continue  # of what an earlier sweep set aside the end is known
            one = vms.setdefault(token["vm_id"], {"vm_id": token["vm_id"], "evidence": None, "resources": 0})
            one["evidence"] = one["evidence"] or token.get("evidence")
            one["resources"] += 1
        if vms:
            found[host] = [vms[vm_id] for vm_id in sorted(vms)]
    return found


def document(realm, sweep, hosts):
    """Return what is published; ``sweep`` is the id that report and journals have for it."""
    return {"event": EVENT, "realm": realm, "sweep": sweep, "check_mode": False, "hosts": hosts}


def post(url, body, *, headers, timeout):
    """Send ``body`` as JSON, once more where that may help; return None, or in a sentence why it was not taken.

    Each try has ``timeout`` seconds in all, however slowly the answer drips in.
    """
    where = shown(url)
    if where is None:
        return "reap_webhook_url is no URL of http or https"
    problem = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        problem, may_help = _within(timeout, lambda: _post(url, body, headers, timeout))
        if problem is None or not may_help:
            break
    return problem and "POST %s: %s" % (where, problem)


def shown(url):
    """Return scheme and host of a URL, None when it is not one that can be asked."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = ":%d" % parts.port if parts.port else ""
    except ValueError:
        return None
    return "%s://%s%s" % (parts.scheme, parts.hostname, port) if parts.scheme in ("http", "https") and parts.hostname \
        else None


def _within(seconds, function):
    """Return what ``function`` returns, in a thread that may be left behind: not all that it waits for has an end."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else ("no answer within %g s" % seconds, True)


def _post(url, body, headers, timeout):
    """Ask once; return ``(problem | None, whether another try may help)``."""
    wanted = {"Content-Type": "application/json", **{name: str(value) for name, value in headers.items()}}
    data = json.dumps(body, sort_keys=True).encode("ascii")
    try:
        answer = open_url(
            url,
            data=data,
            headers=wanted,
            method="POST",
            timeout=timeout,
            follow_redirects="none",
            http_agent="microvm.reaper",
        )
        status = answer.getcode()
        answer.close()
    except urllib.error.HTTPError as err:
        status = err.code
        err.close()
    except urllib.error.URLError as err:
        return "no connection: %s" % _kind(err.reason), True
    except OSError as err:
        return "no connection: %s" % _kind(err), True
    except Exception as err:  # a header that is none, a name that cannot be encoded: nothing stops a sweep
        return "it could not be asked: %s" % type(err).__name__, False
    if 200 <= status < 300:
        return None, False
    if 300 <= status < 400:
        return "HTTP %d: it leads elsewhere, and is not followed; see reap_webhook_url" % status, False
    return "HTTP %d" % status, status in AGAIN


def _kind(reason):
    """Return the kind of an error, not its text: that may carry the request."""
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return getattr(reason, "strerror", None) or type(reason).__name__
