"""How long explorers, pages and their tables take in a browser, as a table. The exit status is 1 if
anything takes longer than it may.

PYTHONPATH=book:tests python -m browser.speed [--busy]
"""

import argparse
import contextlib
import gzip
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from browser import lab
from browser import site as browser_site
from playwright.sync_api import Browser, Page

from lab import site

HANDLES = {
    "schedule": ".knees .handle",
    "mixture": ".handle.shares",
}
"""What is dragged in an explorer."""
PAGES = {
    "mouse": {"viewport": {"width": 1280, "height": 900}},
    "touch": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
MOVES = 200
"""Moves of a drag, a frame apart."""
REDRAW = {"alone": 25, "busy": 50}
"""Milliseconds that 95% of the redraws may take at most: alone, or beside two busy processes."""
FIRST_PAINT, TABLE = 1000, 300
"""Milliseconds until something is painted, and kB of an explorer's table."""
NOTE_FRAMES = """
window.delays = [];
window.addEventListener("pointermove", () => {
    const heard = performance.now();
    requestAnimationFrame(() => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => window.delays.push(performance.now() - heard);
        port2.postMessage(0);  // arrives once the frame is painted
    });
}, true);
"""
"""Notes how long each redraw takes once the page hears of a move. Before that, a finger's move
waits for up to 30 ms in this browser, on an empty page as well."""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def hand(page: Page, by: str) -> tuple[Callable, Callable, Callable]:
    """Return how to press, move and lift a mouse or a finger."""
    if by == "touch":
        touch = browser_site.touches(page)
        return (
            lambda x, y: touch("touchStart", x, y),
            lambda x, y: touch("touchMove", x, y),
            lambda: touch("touchEnd"),
        )

    def press(x: float, y: float) -> None:
        page.mouse.move(x, y)
        page.mouse.down()

    return press, page.mouse.move, page.mouse.up


def time_drag(page: Page, explorer: str, by: str) -> np.ndarray:
    """Return the milliseconds of each redraw in a drag by mouse or finger, until it is painted."""
    handle = page.locator(f'[data-explorer="{explorer}"] {HANDLES[explorer]}').first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    press, move, lift = hand(page, by)
    press(x, y)
    page.evaluate("window.delays.length = 0")
    for step in range(MOVES):
        turn = 2 * np.pi * step / MOVES
        move(x + 80 * np.sin(turn), y + 40 * np.sin(2 * turn))
        page.wait_for_timeout(16)
    lift()
    delays = np.array(page.evaluate("window.delays"))
    assert len(delays) > MOVES / 4, f"{explorer}: only {len(delays)} redraws, by {by}"
    return delays


def time_pages(browser: Browser, address: str, pages: Path, load: str) -> Iterator[tuple]:
    """Yield rows: the first paint of each page, and the redraws of its explorers."""
    for by, how in PAGES.items():
        context = browser.new_context(**how)
        context.add_init_script(NOTE_FRAMES)
        for file in sorted(pages.glob("**/index.html")):
            path, text = file.parent.relative_to(pages), file.read_text()
            page = context.new_page()
            page.goto(f"{address}/{path}")
            painted = page.wait_for_function(PAINTED).json_value()
            yield f"first paint of {path}, {by}", painted, "ms", FIRST_PAINT
            for explorer in HANDLES:
                if f'data-explorer="{explorer}"' in text:
                    page.locator(f'[data-explorer="{explorer}"][data-ready]').wait_for()
                    slow = np.quantile(time_drag(page, explorer, by), 0.95)
                    words = f"{path}, {explorer}, {by}: 95th percentile of a redraw"
                    yield words, slow, "ms", REDRAW[load]
            page.close()
        context.close()


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep some processors busy."""
    spin = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", action="store_true", help="beside two busy processes")
    load = "busy" if parser.parse_args().busy else "alone"
    pages, rows = site.make_site(), []
    busy = busy_processes(2 if load == "busy" else 0)
    with browser_site.served(pages) as address, lab.browser() as browser, busy:
        rows += time_pages(browser, address, pages, load)
    for path in sorted((pages / "explorers" / "data").iterdir()):
        size = len(gzip.compress(path.read_bytes())) / 1000
        rows.append((f"table of {path.stem}, gzipped", size, "kB", TABLE))
    table = pd.DataFrame(rows, columns=["what", "measured", "unit", "at most"])
    print(table.round(1).to_string(index=False))
    slow = table[table["measured"] > table["at most"]]
    if len(slow):
        sys.exit("above its limit: " + "; ".join(slow["what"]))


if __name__ == "__main__":
    main()
