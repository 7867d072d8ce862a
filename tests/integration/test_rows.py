# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Rows of docs/scenarios.md that are about the list of the living: from a real API and a real database to the plan."""

from __future__ import annotations

import itertools
import time

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import brake, manifest, sources
from integration import http_api
from unit.builders import facts, plan, remembered, thing

TABLES = """
    CREATE TABLE vm (id text, host text, state text, also_on text[], destroyed_at timestamptz);
    CREATE TABLE host (name text);
    CREATE TABLE about (realm text, epoch int);
"""


class Api:
    """A control plane with an API, which hands out a manifest."""

    def __init__(self):
        self.server = http_api.Api()
        self.source = {"type": "http", "url": self.server.url, "lookup_url": self.server.url + "/{vm_id}"}
        self.close = self.server.close

    def tell(self, vms=(), ended=(), *, hosts=("h1", "h2"), epoch=None, realm="prod"):
        document = {
            "realm": realm,
            "generated_at": time.time(),
            "complete": True,
            "epoch": epoch,
            "hosts": list(hosts),
            "count": len(vms),
            "vms": [dict(zip(("vm_id", "host", "state", "also_on"), vm, strict=False)) for vm in vms],
            "tombstones": [{"vm_id": vm_id, "destroyed_at": time.time() - ago} for vm_id, ago in ended],
        }
        single = {vm["vm_id"]: vm for vm in document["vms"]}

        def answer(request):
            if request.path.endswith("/vms"):
                return http_api.reply(document)
            found = single.get(request.path.rpartition("/")[2])
            return http_api.reply(found) if found else http_api.reply({}, 404)

        self.server.answer = answer


class Database:
    """A control plane that keeps its VMs in PostgreSQL."""

    def __init__(self, server):
        self.server, self.dbname = server, server.database(TABLES)
        self.source = {
            "type": "postgresql",
            **server.options(self.dbname),
            "query": "SELECT id AS vm_id, host, state, also_on, destroyed_at FROM vm",
            "hosts_query": "SELECT name FROM host",
            "realm_query": "SELECT realm FROM about",
            "epoch_query": "SELECT epoch FROM about",
        }

    def close(self):
        pass

    def tell(self, vms=(), ended=(), *, hosts=("h1", "h2"), epoch=0, realm="prod"):
        self.server.sql("TRUNCATE vm, host, about", dbname=self.dbname)
        with self.server.connect(self.dbname) as connection, connection.cursor() as cursor:
            cursor.execute("INSERT INTO about VALUES (%s, %s)", (realm, epoch))
            cursor.executemany("INSERT INTO host VALUES (%s)", [(host,) for host in hosts])
            rows = [(*vm, *[None] * (4 - len(vm)), None) for vm in vms]
            rows += [(vm_id, None, None, None, time.time() - ago) for vm_id, ago in ended]
            cursor.executemany("INSERT INTO vm VALUES (%s, %s, %s, %s, to_timestamp(%s))", rows)


class Sweeper:
    """Asks the control plane, and plans hosts by what it said."""

    def __init__(self, plane, place):
        self.plane, self._place, self._number = plane, place, itertools.count()
        self.tell = plane.tell

    def fetch(self):
        index = str(self._place / ("%d.sqlite" % next(self._number)))
        return sources.fetch([self.plane.source], self._context(), index, max_age=600)

    def plan(self, host_facts, host="h1", handle=None, **changes):
        share = manifest.share(handle or self.fetch(), host, ids(host_facts))
        return plan(host_facts, share, host=host, **changes)

    def twice(self, *things, **changes):
        """Return the plan of the second of two sweeps."""
        first = self.plan(facts(*things), **changes)
        return self.plan(facts(*things, now=1100.0, ledger=remembered(first)), **changes)

    def still_listed(self, vm_ids, handle):
        return sources.still_listed([self.plane.source], self._context(), vm_ids, handle, max_age=600)[0]

    @staticmethod
    def _context():
        return {"realm": "prod", "now": time.time(), "directory": "/", "terminal_states": manifest.TERMINAL_STATES}


def ids(host_facts):
    named = {one["vm_id"] for kind in host_facts["kinds"].values() for one in kind["resources"]}
    return named | set(host_facts["ledger"]["reaped"])


@pytest.fixture(params=["http", "postgresql"])
def sweeper(request, tmp_path):
    plane = Api() if request.param == "http" else Database(request.getfixturevalue("postgres"))
    yield Sweeper(plane, tmp_path)
    plane.close()


def reaped(result):
    return [token["vm_id"] for token in result["reap"]]


OTHERS = [("here", "h1", "running"), *(("other%d" % number, "h2", "running") for number in range(40))]
DEAD = thing("cgroup", "dead")


def test_what_is_dead_goes(sweeper):
    """The rest is worth nothing if this is not so."""
    sweeper.tell(OTHERS)
    assert reaped(sweeper.twice(DEAD, thing("cgroup", "here", name="a"))) == ["dead"]


def test_row_01_an_empty_list(sweeper):
    sweeper.tell([])
    result = sweeper.twice(DEAD)
    assert (result["refused"]["code"], result["ledger_changed"]) == ("blind", False)
    assert reaped(sweeper.twice(DEAD, expect_empty="prod")) == ["dead"]


def test_row_03_a_list_that_shrank(sweeper):
    sweeper.tell(OTHERS)
    first = sweeper.plan(facts(DEAD))
    sweeper.tell(OTHERS[:10])
    second = sweeper.plan(facts(DEAD, now=1100.0, ledger=remembered(first)))
    assert (second["refused"]["code"], second["reap"]) == ("shrunk", [])
    assert second["ledger"]["strikes"] == first["ledger"]["strikes"]
    sweeper.tell(OTHERS[:30])
    assert reaped(sweeper.plan(facts(DEAD, now=1100.0, ledger=remembered(first)))) == ["dead"]


def test_row_04_an_older_copy_answers(sweeper):
    sweeper.tell(OTHERS, epoch=7)
    first = sweeper.plan(facts(DEAD))
    handle = sweeper.fetch()
    sweeper.tell(OTHERS, epoch=6)
    second = sweeper.plan(facts(DEAD, now=1100.0, ledger=remembered(first)))
    assert (second["refused"]["code"], second["reap"]) == ("epoch_went_back", [])
    # And when it comes to answer only after the list was fetched, the late look sees it.
    with pytest.raises(manifest.ManifestError, match="was at epoch 7 and is at 6 now"):
        sweeper.still_listed({"dead"}, handle)


def test_row_05_another_realm_and_a_host_it_does_not_know(sweeper):
    sweeper.tell(OTHERS, realm="staging")
    try:
        assert sweeper.twice(DEAD)["refused"]["code"] == "other_realm"
    except manifest.ManifestError as err:
        assert err.code == "other_realm"
    sweeper.tell(OTHERS)
    assert sweeper.plan(facts(DEAD), host="h3")["refused"]["code"] == "host_unknown"
    sweeper.tell(OTHERS, hosts=["h1"])
    with pytest.raises(manifest.ManifestError, match="is not in the manifest's hosts"):
        sweeper.fetch()


def test_row_06_the_clock_of_the_wall_steps(sweeper):
    """Strikes are spaced by the host's own boot clock, whatever the time is elsewhere."""
    sweeper.tell(OTHERS)
    first = sweeper.plan(facts(DEAD))
    assert sweeper.plan(facts(DEAD, now=1030.0, ledger=remembered(first)))["reap"] == []
    assert reaped(sweeper.plan(facts(DEAD, now=1090.0, ledger=remembered(first)))) == ["dead"]


def test_row_07_a_reboot_between_the_strikes(sweeper):
    sweeper.tell(OTHERS)
    first = sweeper.plan(facts(DEAD, thing("jail", "dead2")))
    jail = thing("jail", "dead2")
    again = thing("cgroup", "dead", identity="another boot's")
    # What outlived it keeps one strike, and waits for a quiet time after the boot.
    second = sweeper.plan(facts(again, jail, now=30.0, boot="boot-2", ledger=remembered(first)))
    assert second["reap"] == []
    third = sweeper.plan(facts(again, jail, now=80.0, boot="boot-2", ledger=remembered(second, remembered(first))))
    assert reaped(third) == ["dead2"]
    fourth = sweeper.plan(facts(again, now=180.0, boot="boot-2", ledger=remembered(third, remembered(second))))
    assert reaped(fourth) == ["dead"]


def test_row_08_a_vm_that_boots_is_not_listed_yet(sweeper):
    sweeper.tell(OTHERS)
    young = [thing("cgroup", "new", age=5.0), thing("jail", "new", age=None)]
    first = sweeper.plan(facts(*young))
    assert (first["families"]["new"]["verdict"], first["ledger"]["strikes"]) == ("held", {})
    sweeper.tell([*OTHERS, ("new", "h1", "starting")])
    second = sweeper.plan(facts(*young, now=1100.0, ledger=remembered(first)))
    assert (second["vms"]["live"], second["families"]) == (1, {})


def test_row_08_a_vm_that_is_listed_only_after_the_list_was_fetched(sweeper):
    sweeper.tell(OTHERS)
    handle = sweeper.fetch()
    first = sweeper.plan(facts(DEAD), handle=handle)
    second = sweeper.plan(facts(DEAD, now=1100.0, ledger=remembered(first)), handle=handle)
    assert reaped(second) == ["dead"]
    sweeper.tell([*OTHERS, ("dead", "h1", "starting")])
    listed = sweeper.still_listed({"dead"}, handle)
    assert set(brake.live_again({"h1": second}, listed, not handle["names_hosts"])["h1"]) == {"dead"}


def test_row_09_destroyed_a_moment_ago(sweeper):
    sweeper.tell(OTHERS, [("dead", 5)])
    family = sweeper.twice(DEAD)["families"]["dead"]
    assert (family["verdict"], family["reasons"][0]["code"]) == ("held", "recently_destroyed")
    sweeper.tell(OTHERS, [("dead", 4000)])
    result = sweeper.twice(DEAD)
    assert (reaped(result), result["families"]["dead"]["evidence"]) == (["dead"], "tombstoned")


@pytest.mark.parametrize("state", ["migrating", "paused", "hibernated", "a state of tomorrow", None])
def test_row_10_whatever_is_not_over_lives_wherever_it_is_named(sweeper, state):
    sweeper.tell([*OTHERS, ("vm", "h2", state, ["h1"])])
    for host in ("h1", "h2"):
        things = facts(thing("cgroup", "vm"))
        result = sweeper.plan(things, host=host)
        assert (result["vms"]["live"], result["families"], result["refused"]) == (1, {}, None)


def test_row_11_an_id_that_is_used_again(sweeper):
    sweeper.tell([*OTHERS, ("twice", "h1", "running")], [("twice", 9000)])
    old, new = thing("cgroup", "twice", name="old"), thing("cgroup", "twice", name="new")
    result = sweeper.twice(old, new)
    assert (result["vms"]["live"], result["reap"]) == (1, [])


def test_row_33_percentages_are_of_the_hosts_that_answered(sweeper):
    sweeper.tell(OTHERS[:12])
    dead = [thing("cgroup", "dead%d" % number) for number in range(12)]
    first, handle = sweeper.plan(facts(*dead)), sweeper.fetch()
    second = sweeper.plan(facts(*dead, now=1100.0, ledger=remembered(first)), handle=handle)
    # h2 is not there: twelve of the 24 that are known go, and that is more than 30 %.
    abort, refused = brake.brake({"h1": second})
    assert (abort["code"], refused, len(second["reap"])) == ("fleet_cap", {}, 12)
    abort, refused = brake.brake({"h1": second}, {**brake.DEFAULT_CAPS, "max_percent": 50})
    assert (abort, refused) == (None, {})
