# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Collections of others, out of the package that has all of them: inventory plugins for the recipes, with their
libraries, and the modules that talk to AWX."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hosts.fleet import ROOT

ANSIBLE = "14.5.0"
# The last one that has awx.awx, of AWX 24.6.1.
ANSIBLE_WITH_AWX = "11.13.0"
WANTED = ("ansible_collections/community/libvirt/", "ansible_collections/openstack/cloud/")
REQUIREMENTS = ROOT / "tests/integration/recipes.txt"
# Debian's, for its own Python (bindep.txt).
LIBVIRT = "/usr/lib/python3/dist-packages"


@dataclass
class Community:
    """``collections`` and ``libraries`` are directories for ANSIBLE_COLLECTIONS_PATH and PYTHONPATH."""

    collections: Path
    libraries: Path

    @property
    def has_libvirt(self) -> bool:
        version = "cpython-%d%d-" % sys.version_info[:2]
        return any(version in path.name for path in self.libraries.glob("libvirtmod.*.so"))


def installed() -> Community:
    """Install what the recipes need where it is not yet; some 50 MB are downloaded for it."""
    key = zlib.crc32(f"{ANSIBLE} {WANTED} {sys.version_info[:2]} {REQUIREMENTS.read_text()}".encode())
    place = ROOT / ".cache" / f"community-{key:08x}"
    _once(place, _install)
    return Community(place, place / "libraries")


def awx() -> Path:
    """Return a directory for ANSIBLE_COLLECTIONS_PATH that has awx.awx; some 60 MB are downloaded for it."""
    place = ROOT / ".cache" / f"awx-{ANSIBLE_WITH_AWX}"
    _once(place, lambda new: _unpack(new, ANSIBLE_WITH_AWX, ("ansible_collections/awx/awx/",)))
    return place


def _once(place: Path, install: Callable[[Path], None]) -> None:
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as directory:
            new = Path(directory) / "new"
            new.mkdir()
            install(new)
            new.rename(place)  # whole or not at all


def _unpack(place: Path, ansible: str, wanted: tuple[str, ...]) -> None:
    # The package needs a newer Python than the collections in it.
    package = ("--no-deps", "--only-binary=:all:", "--python-version=3.13", f"ansible=={ansible}")
    _pip("download", f"--dest={place}", *package)
    (wheel,) = place.glob("ansible-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place, [name for name in archive.namelist() if name.startswith(wanted)])
    wheel.unlink()


def _install(place: Path) -> None:
    _unpack(place, ANSIBLE, WANTED)
    _pip("install", "--no-deps", f"--target={place / 'libraries'}", f"--requirement={REQUIREMENTS}")
    for path in Path(LIBVIRT).glob("libvirt*"):
        if path.suffix in (".py", ".so"):
            (place / "libraries" / path.name).symlink_to(path)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
