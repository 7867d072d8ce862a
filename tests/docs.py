"""Check that ansible-doc renders the documentation of every plugin and role of the checkout."""

import json
import subprocess
import sys

KINDS = ("module", "filter", "lookup", "role", "callback", "inventory", "test")


def ansible_doc(*args: str) -> str:
    done = subprocess.run(["ansible-doc", *args], capture_output=True, text=True, check=False)
    # A page that cannot be parsed is a warning to ansible-doc; to its reader it is missing.
    if done.returncode or "[WARNING]" in done.stderr or "[ERROR]" in done.stderr:
        raise SystemExit(f"ansible-doc {' '.join(args)}:\n{done.stderr}")
    return done.stdout


def main() -> int:
    pages = 0
    for kind in KINDS:
        names = json.loads(ansible_doc("--type", kind, "--list", "--json", "microvm.reaper"))
        for name in sorted(names):
            if not ansible_doc("--type", kind, name).strip():
                raise SystemExit(f"{kind} {name} has no documentation")
            pages += 1
    print(f"{pages} pages render")
    return 0 if pages else 1


if __name__ == "__main__":
    sys.exit(main())
