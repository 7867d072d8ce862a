"""Install the Debian packages of a bindep file that are missing, or say which to install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def wanted(text: str) -> list[str]:
    lines = (line.split("#")[0].split() for line in text.splitlines())
    return [words[0] for words in lines if words]


def installed(names: list[str]) -> set[str]:
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *names]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return {line.split()[0] for line in lines if line.endswith(" installed")}


def main() -> int:
    names = wanted(Path(sys.argv[1]).read_text())
    if not shutil.which("apt-get"):
        print(f"This is not Debian: the tests need the equivalents of {' '.join(names)}", file=sys.stderr)
        return 0
    missing = sorted(set(names) - installed(names))
    if not missing:
        return 0
    if os.geteuid() != 0:
        print(f"Please run first: sudo apt-get install --no-install-recommends {' '.join(missing)}", file=sys.stderr)
        return 1
    print(f"Installing {' '.join(missing)}", flush=True)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]
    # The tests start the daemons they need themselves: a package must not start its own.
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run([*apt, "update"], env=env, check=True)
    subprocess.run([*apt, "install", "--yes", "--no-install-recommends", *missing], env=env, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
