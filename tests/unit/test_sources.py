# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where the list of live VMs comes from: options, and files in any state."""

from __future__ import annotations

import json
import os
import tempfile

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from unit.builders import document

NOW = 1_800_000_010.0


def context(directory="/"):
    known = {"realm": "prod", "now": NOW, "directory": str(directory), "inventory": None}
    return dict(known, terminal_states=manifest.TERMINAL_STATES)


def fetch(*wanted, directory="/"):
    """Return the handle of what the sources list, and ``live``: which of a few ids live on h1 and h2."""
    with tempfile.TemporaryDirectory() as place:
        handle = sources.fetch(list(wanted), context(directory), place + "/index", max_age=600)
        ids = {"v1", "v2", "v3"}
        live = {host: manifest.share(handle, host, ids)["live"] for host in ("h1", "h2")}
    return dict(handle, live=live)


def refusal(*wanted):
    with pytest.raises(manifest.ManifestError) as caught:
        fetch(*wanted)
    return caught.value.code, str(caught.value)


def of(path, **others):
    return dict({"type": "file", "path": str(path)}, **others)


@pytest.fixture
def write(tmp_path):
    def writer(content, name="live.yml"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return of(tmp_path / name)

    return writer


def test_yaml_and_json(write, tmp_path):
    text = """
realm: prod
generated_at: 2027-01-15T08:00:00Z
vms:
  - vm_id: v1
    host: h1
complete: true
"""
    for content in (text, json.dumps(document()), "\n  " + json.dumps(document())):
        assert fetch(write(content))["live"] == {"h1": ["v1"], "h2": ["v1"]}  # no hosts are named
    assert fetch(of("live.yml"), directory=tmp_path)["source"] == "file live.yml"


YAML = """realm: prod
generated_at: 2027-01-15T08:00:00Z
count: 2
vms:
  - {vm_id: v1, host: h1}
  - vm_id: v12
    host: h12
    also_on: [h1, h2]
"""


@pytest.mark.parametrize("end", ["complete: true\n", "complete: true", "complete: true\n...\n"])
def test_of_a_list_in_yaml_no_beginning_is_proven(write, end):
    text = YAML + end
    assert fetch(write(text))["proven"]
    whole = len(text.rstrip()) if "..." not in text else text.index("\n...")
    for length in range(whole):
        try:
            handle = fetch(write(text[:length]))
        except manifest.ManifestError:
            continue
        assert not handle["proven"], text[:length]


def test_a_list_in_yaml_that_is_complete_from_its_first_line_on_is_not_proven(write):
    handle = fetch(write("complete: true\n" + YAML))
    assert not handle["proven"] and "has to end with the line 'complete: true'" in handle["unproven"][0]
    assert fetch(write("complete: true\n" + YAML + "...\n"))["proven"]



@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\x00",
        b"\xff\xfe\x00",
        "realm: caf\xe9".encode("latin-1"),
        json.dumps(document()).encode("utf-16"),
        json.dumps(document())[:-20].encode(),
        b"{'realm': ",
        b"a: b: c",
        b"\t- x",
        b"{" * 100000,
        b'{"a":' * 100000,
        b"[" * 5000,
        b"- " * 5000,
        b"!!timestamp abc",
        b"!!bool abc",
        b"!!int ''",
        b"!!float abc",
        b"!!binary '*'",
        b"!!python/object/apply:os.system [id]",
        b"2027-99-99",
        b"? {a: b}\n: c",
        b"*unknown",
        b"a: &a [*a]",
        b"generated_at: " + b"9" * 5000,
    ],
)
def test_row_02_a_file_in_any_state_is_believed_or_refused(write, content):
    code, said = refusal(write(content))
    assert code in ("unreadable", "not_a_manifest")
    assert "live.yml" in said
    assert "\n" not in said


def test_a_bomb_of_references_costs_nothing(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += ["a%d: &a%d [%s]" % (n, n, ", ".join(["*a%d" % (n - 1)] * 9)) for n in range(1, 30)]
    assert refusal(write("\n".join(lines)))[0] == "not_a_manifest"


def lines(vms, **head):
    first = {key: value for key, value in document(**head).items() if key != "vms"}
    return "".join(json.dumps(one) + "\n" for one in [first, *vms])


TWO = [{"vm_id": "v1", "host": "h1"}, {"vm_id": "v2", "host": "h2", "state": "running"}]


def test_json_lines(write):
    whole = fetch(write(lines(TWO, count=2, hosts=["h1", "h2"]), "live.jsonl"))
    assert (whole["count"], whole["proven"]) == (2, True)
    assert whole["live"] == {"h1": ["v1"], "h2": ["v2"]}
    assert fetch(write(lines(TWO, sha256=manifest.sha256(["v1", "v2"])), "live.jsonl"))["proven"]
    assert not fetch(write(lines(TWO, count=2, proven=False), "live.jsonl"))["proven"]
    assert fetch(write(lines([], count=0), "live.jsonl"))["count"] == 0


def test_row_02_lines_that_may_be_missing(write):
    for head in ({}, {"count": None}):
        bare = fetch(write(lines(TWO, **head), "live.jsonl"))
        assert (bare["count"], bare["proven"]) == (2, False)
        assert "has to say its count or sha256" in bare["unproven"][0]
    content = lines(TWO, count=2)
    assert refusal(write(content.rpartition("{")[0], "live.jsonl"))[0] == "incomplete"
    assert "its last line is cut off" in refusal(write(content[:-1], "live.jsonl"))[1]
    assert refusal(write(content[:-5] + "\n", "live.jsonl"))[0] == "unreadable"
    assert refusal(write(content + "\n", "live.jsonl"))[0] == "unreadable"
    assert refusal(write(content + "[]\n", "live.jsonl"))[0] == "not_a_manifest"
    assert refusal(write(content + "[" * 100000 + "\n", "live.jsonl"))[0] == "unreadable"


def test_lines_are_read_one_at_a_time_and_the_file_is_closed(write, tmp_path):
    write(lines(TWO * 1000, count=2000), "live.jsonl")
    before = os.listdir("/proc/self/fd")
    module = sources.importlib.import_module(sources.__name__ + ".file")
    found = module.fetch({"path": "live.jsonl"}, context(tmp_path))
    assert next(found["vms"]) == TWO[0]
    found["vms"].close()
    module.fetch({"path": "live.jsonl"}, context(tmp_path))["vms"].close()
    assert os.listdir("/proc/self/fd") == before


def test_what_is_no_file(tmp_path):
    code, said = refusal(of(tmp_path / "nothing"))
    assert (code, "No such file" in said) == ("unreadable", True)
    code, said = refusal(of(tmp_path))
    assert (code, "directory" in said) == ("unreadable", True)


def test_a_file_that_is_too_large(write, monkeypatch):
    monkeypatch.setattr(sources.importlib.import_module(sources.__name__ + ".file"), "MAX_BYTES", 20)
    assert "larger than 20 bytes" in refusal(write(json.dumps(document())))[1]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([], "reap_live_sources is empty"),
        (["file"], r"reap_live_sources\[0\]: 'type' must be one of .*file.*, not None"),
        ([{}], r"reap_live_sources\[0\]: 'type'"),
        ([{"type": ["file"]}], r"reap_live_sources\[0\]: 'type'"),
        ([{"type": "fil"}], "'type' must be one of .*not 'fil'"),
        ([{"type": "__init__"}], "'type' must be one of"),
        ([of("x"), {"type": "file"}], r"reap_live_sources\[1\] \(file\): .*path"),
        ([of("x", pth="y")], r"reap_live_sources\[0\] \(file\): .*pth"),
        ([of("x", required="perhaps")], r"reap_live_sources\[0\] \(file\): .*required"),
    ],
)
def test_options_that_are_wrong_are_named(wanted, said):
    with pytest.raises(manifest.ManifestError, match=said):
        sources.configured(wanted)


def test_every_source_keeps_the_contract():
    assert "file" in sources.types() and "inventory" in sources.types()
    for name in sources.types():
        module = sources.importlib.import_module("%s.%s" % (sources.__name__, name))
        assert callable(module.describe)
        assert callable(getattr(module, "fetch", None)) != getattr(module, "ON_HOST", False)
        assert not {"type", "required"} & set(module.OPTIONS)


def test_a_source_that_fails_stops_all_unless_it_is_optional(write, tmp_path):
    good, missing = write(json.dumps(document())), of(tmp_path / "nothing", required=False)
    both = fetch(good, missing)
    assert both["count"] == 1
    assert [skipped.split(":")[0] for skipped in both["skipped"]] == ["unreadable"]
    assert refusal(good, of(tmp_path / "nothing"))[0] == "unreadable"
    assert refusal(missing)[0] == "no_source"


def test_the_union_of_two_files(write):
    one = write(json.dumps(document([("v1", "h1")], hosts=["h1"], epoch=4)), "a.json")
    other = write(json.dumps(document([("v2", "h2")], hosts=["h2"])), "b.json")
    both = fetch(one, other)
    assert (both["count"], both["names_hosts"]) == (2, True)
    assert both["live"] == {"h1": ["v1"], "h2": ["v2"]}
    assert both["answered"] == [both["source"].split(", ")[0], both["source"].split(", ")[1]]
    assert list(both["epochs"].values()) == [4]


def test_a_secret_that_is_wrong_is_not_quoted(monkeypatch):
    module = sources.importlib.import_module(sources.__name__ + ".file")
    monkeypatch.setattr(module, "OPTIONS", dict(module.OPTIONS, token={"type": "int", "no_log": True}))
    with pytest.raises(manifest.ManifestError) as caught:
        sources.configured([of("x", token="hunter2")])
    assert "token" in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("said", "written", "age"),
    [
        (-20, -20, 20.0),
        (-300, -20, 300.0),  # copied here later
        (-20, -300, None),  # a clock that is minutes ahead of ours
        (0, -30, 30.0),  # as far as clocks may differ
        (0, -31, None),
        (-20, 500, 20.0),  # the date of the file is wrong, which proves nothing
    ],
)
def test_row_06_a_list_is_as_old_as_its_file(tmp_path, files_have_no_date, said, written, age, ending):
    files_have_no_date.undo()
    head = dict(document(), generated_at=NOW + said, count=1)
    vms = head.pop("vms")
    lines = [head, *vms] if ending == "jsonl" else [dict(head, vms=vms)]
    path = tmp_path / ("live." + ending)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path, (NOW + written, NOW + written))
    about = {"now": NOW, "directory": str(tmp_path), "terminal_states": ["gone"]}
    wanted = [{"type": "file", "path": str(path)}]
    if age is None:
        told = "^file .*: by its own words it was generated %d s after it was written here" % (said - written)
        with pytest.raises(manifest.ManifestError, match=told) as caught:
            sources.fetch(wanted, about, str(tmp_path / "index"), max_age=600)
        assert caught.value.code == "from_the_future"
    else:
        assert sources.fetch(wanted, about, str(tmp_path / "index"), max_age=600)["age"] == age


def test_row_04_a_file_that_nobody_writes_any_more_is_stale_whatever_its_clock_says(tmp_path, files_have_no_date):
    files_have_no_date.undo()
    path = tmp_path / "live.json"
    path.write_text(json.dumps(dict(document(), generated_at=NOW - 580)))
    os.utime(path, (NOW - 605, NOW - 605))
    about = {"now": NOW, "directory": str(tmp_path), "terminal_states": ["gone"]}
    told = "605 s old, more than reap_manifest_max_age=600; by its own words 580 s, but it was written here before"
    with pytest.raises(manifest.ManifestError, match=told) as caught:
        sources.fetch([{"type": "file", "path": str(path)}], about, str(tmp_path / "index"), max_age=600)
    assert caught.value.code == "stale"


def test_when_a_list_was_made_is_an_instant():
    with pytest.raises(manifest.ManifestError, match="^s: made_before: not an instant"):
        manifest.check(dict(document(), made_before="yesterday"), "s", now=NOW, max_age=600)
