"""Write constraints.txt: exact versions of all third parties, and the sha256 of all their files.

    python -m tests.lock                      # what pyproject.toml asks for, in the versions so far
    python -m tests.lock --upgrade            # in the newest versions
    python -m tests.lock --wheels PLACE ...   # and wheels of another index or a folder

It needs `uv` (`pip install uv`).

The versions are those of every platform at once. PLACE is a folder, or a page of an index, such as
https://download.pytorch.org/whl/cpu/torch/, whose builds of torch for CPUs have names and hashes of
their own. Hashes that the file has for a version stay as long as the version does.
"""

import argparse
import re
import subprocess
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from cmp.files import file_digest, write_atomic

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
OLDEST = "3.11.0"
"""The oldest Python that pyproject.toml allows."""
TOOLS = "pip\nsetuptools\nnodejs-wheel-binaries\n"
"""What the Makefile installs beside what pyproject.toml asks for."""
HEAD = """# The exact versions that were tested together, and the sha256 of all their files; used
# by the Makefile, and written by `python -m tests.lock`.
"""
Entries = dict[str, tuple[str, str, set[str]]]


def read_lock(text: str) -> Entries:
    """Name -> version, environment marker, and hashes."""
    entries = {}
    for line in text.replace("\\\n", "").splitlines():
        requirement, *hashes = line.split("--hash=sha256:")
        name, is_pinned, rest = requirement.partition("==")
        if is_pinned and not name.startswith("#"):
            version, _, marker = rest.partition(";")
            entries[name] = (version.strip(), marker.strip(), {each.strip() for each in hashes})
    return entries


def resolve(pins: str) -> str:
    """What `uv` finds for all platforms, within the given pins."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("tools.in", "pins.txt", "lock.txt")]
        for path, content in zip(paths, (TOOLS, pins, ""), strict=True):
            path.write_text(content)
        command = ["uv", "pip", "compile", "--quiet", "--universal"]
        command += ["--all-extras", "--generate-hashes", "--no-annotate", "--no-header"]
        command += ["--python-version", OLDEST, "--no-sources", str(ROOT / "pyproject.toml")]
        subprocess.run([*command, *paths[:1], "-c", paths[1], "-o", paths[2]], check=True)
        return paths[2].read_text()


def wheels(place: str) -> dict[str, str]:
    """The sha256 of each wheel of a folder or of a page of an index, by the wheel's name."""
    if "://" not in place:
        return {path.name: file_digest(path) for path in Path(place).glob("*.whl")}
    with urllib.request.urlopen(place, timeout=60) as page:
        text = page.read().decode()
    links = re.findall(r'href="(?:[^"#]*/)?([^"/#]+\.whl)#sha256=([0-9a-f]{64})', text)
    return {urllib.parse.unquote(name): digest for name, digest in links}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="newest versions")
    parser.add_argument("--wheels", nargs="*", default=[], metavar="PLACE")
    arguments = parser.parse_args()
    before = read_lock(LOCK.read_text())
    pins = "".join(f"{name}=={version}\n" for name, (version, *_) in before.items())
    entries = read_lock(resolve("" if arguments.upgrade else pins))
    for name, (version, _, hashes) in entries.items():
        old, _, known = before.get(name, ("", "", set()))
        hashes |= known if old == version else set()
    for wheel, digest in (pair for place in arguments.wheels for pair in wheels(place).items()):
        name, version = wheel.split("-")[:2]
        entry = entries.get(name.lower().replace("_", "-"))
        if entry and version.partition("+")[0] == entry[0]:
            entry[2].add(digest)
    lines = [HEAD]
    for name, (version, marker, hashes) in entries.items():
        first = f"{name}=={version}{f' ; {marker}' if marker else ''}"
        lines.append(" \\\n    --hash=sha256:".join([first, *sorted(hashes)]) + "\n")
    write_atomic(LOCK, "".join(lines))


if __name__ == "__main__":
    main()
