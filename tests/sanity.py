"""Run `ansible-test sanity` on the collection as users get it: built, then installed.

ansible-test fetches its copy of pip from a server of its own. A prepared script in its cache,
which takes pip from the package index like everything else, makes it independent of that.
The cache lies under .cache/, so that the home directory of the user stays as it is.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".cache" / "ansible-test"
BIN = Path(sys.executable).parent
GET_PIP = """\
import subprocess, sys
subprocess.check_call([sys.executable, "-m", "ensurepip"], stdout=subprocess.DEVNULL)
subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", "pip=={version}"])
"""


def prepare_home() -> None:
    source = next(f for f in files("ansible-core") or [] if f.match("ansible_test/_internal/python_requirements.py"))
    version = re.findall(r"pip='([\d.]+)'", source.read_text())[0]
    cache = HOME / ".ansible/test/cache"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / f"get_pip_{version.replace('.', '_')}.py").write_text(GET_PIP.format(version=version))
    # ansible-test passes no PIP_* variables on, and with another home pip misses the user's settings.
    settings = subprocess.check_output([BIN / "pip", "config", "list"], text=True)
    lines = [f"{name} = {value}" for name, value in re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", settings, re.M)]
    config = HOME / ".config/pip/pip.conf"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("\n".join(["[global]", *dict.fromkeys(lines), "quiet = 2"]) + "\n")


def search_path() -> str:
    """The interpreters of pyenv themselves instead of its shims, which fail for versions that are not selected."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    path = [p for p in os.environ["PATH"].split(":") if Path(p) != pyenv / "shims"]
    return ":".join([str(BIN), *path, *map(str, sorted(pyenv.glob("versions/*/bin")))])


def main() -> int:
    prepare_home()
    with tempfile.TemporaryDirectory(prefix="reaper-sanity-") as tmp:
        env = {**os.environ, "HOME": str(HOME), "PATH": search_path(), "ANSIBLE_COLLECTIONS_PATH": tmp}
        env.pop("ANSIBLE_CONFIG", None)

        def galaxy(*args: str) -> None:
            command = [BIN / "ansible-galaxy", "collection", *args]
            subprocess.run(command, cwd=tmp, env=env, check=True, stdout=subprocess.DEVNULL)

        galaxy("build", str(ROOT))
        galaxy("install", "--offline", *map(str, Path(tmp).glob("*.tar.gz")))
        sanity = [BIN / "ansible-test", "sanity", "--python", "default", "--color", "no", *sys.argv[1:]]
        collection = Path(tmp) / "ansible_collections/microvm/reaper"
        return subprocess.run(sanity, cwd=collection, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
