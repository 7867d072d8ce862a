# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One sweep of this host by itself, as systemd starts it: sweep.py ANSIBLE_PLAYBOOK PLAYBOOK INVENTORY

Runs the playbook, says in one line what came of it (the Status of systemctl status, and the last line of the journal),
and ends when what the sweep still reads in the background has ended, with the playbook's exit code.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
# Evidence of what was removed may be read for a minute more; systemd ends what is left when we end.
BACKGROUND_SECONDS = 75
LONGEST = 400


def main(argv):
    """Sweep; return the exit code."""
    program, playbook, inventory = argv[1:]
    place = os.environ.get("RUNTIME_DIRECTORY", "/run/microvm.reaper")
    report = os.path.join(place, "report.json")
    forget(report)
    # A sweep that was killed left its copy of the list there, and we are alone: systemd starts no second one.
    shutil.rmtree(os.path.join(place, "tmp"), ignore_errors=True)
    # What outlives its parent becomes our child, so that we can wait for it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tell("sweeping")
    code = run([program, "-i", inventory, "-e", "reap_report_path=%s" % report, playbook])
    line = in_words(read(report), code)
    print(line, flush=True)
    tell(line)
    wait_for_the_rest(time.monotonic() + BACKGROUND_SECONDS)
    return code


def run(command):
    """Run a command that ends when we are told to; return its exit code, by a signal as a shell has it."""
    children, told = [], []

    def hand_on(number, _frame):
        told.append(number)
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as err:
        print("%s cannot be run: %s" % (command[0], err.strerror), flush=True)
        return 127
    children.append(child)
    for number in told:  # while it was started
        child.send_signal(number)
    code = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code if code >= 0 else 128 - code


def in_words(report, code):
    """Return what came of the sweep as one line; ``report`` is what read() returned."""
    if report is None:
        return "microvm.reaper: no sweep: ansible-playbook ended with code %d before it had anything to report" % code
    try:
        found = report["headline"]
        hosts = report["hosts"].values()
        refused = report["stopped"] or next((one["refused"] for one in hosts if one["refused"]), None)
        if refused:
            found += ": REFUSED (%s): %s" % (refused["code"], refused["message"])
        elif code:
            found += "; FAILED: %s" % (next((one["error"] for one in hosts if one["error"]), None) or "see the journal")
    except (KeyError, TypeError, AttributeError):
        found = "microvm.reaper: its report cannot be read, and ansible-playbook ended with code %d" % code
    shown = "".join(one if one.isprintable() else " " for one in found)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "..."


def wait_for_the_rest(deadline):
    """Wait for all children that are left."""
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.1)
        except ChildProcessError:
            return


def read(path):
    """Return what a report says, None where there is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


def forget(path):
    """Remove the report of the sweep before: what fails early must not tell of that."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def tell(line):
    """Tell systemd how it stands, where it listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"STATUS=" + line.encode("utf-8", "replace"), address.replace("@", "\0", 1))
        except OSError as err:
            print("systemd does not listen: %s" % err.strerror, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
