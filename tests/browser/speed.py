"""How long explorers, pages and their tables take in a browser, as a table.

PYTHONPATH=book:tests python -m browser.speed
"""

import gzip

import numpy as np
import pandas as pd
from browser import lab
from browser import site as browser_site
from playwright.sync_api import Page

from lab import site

HANDLES = {
    "schedule": ".knees .handle",
    "mixture": ".handle.shares",
    "atlas": ".brush .overlay",
}
"""What is dragged in an explorer."""
MOVES = 200
"""Moves of the mouse in a drag, a frame apart."""
NOTE_FRAMES = """
window.delays = [];
window.addEventListener("pointermove", (event) => requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => window.delays.push(performance.now() - event.timeStamp);
    port2.postMessage(0);  // arrives once the frame is painted
}), true);
"""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def time_drag(page: Page, explorer: str) -> np.ndarray:
    """Return the milliseconds from each move of the mouse until the page is painted anew."""
    handle = page.locator(f'[data-explorer="{explorer}"] {HANDLES[explorer]}').first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate("window.delays.length = 0")
    for move in range(MOVES):
        turn = 2 * np.pi * move / MOVES
        page.mouse.move(x + 80 * np.sin(turn), y + 40 * np.sin(2 * turn))
        page.wait_for_timeout(16)
    page.mouse.up()
    return np.array(page.evaluate("window.delays"))


def main() -> None:
    """Print the table."""
    pages, rows = site.make_site(), []
    tables = {path.stem: path for path in (pages / "explorers" / "data").iterdir()}
    with browser_site.served(pages) as address, lab.browser() as browser:
        for file in sorted(pages.glob("**/index.html")):
            text, path = file.read_text(), file.parent.relative_to(pages)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.add_init_script(NOTE_FRAMES)
            page.goto(f"{address}/{path}")
            painted = page.wait_for_function(FIRST_PAINT).json_value()
            rows.append((f"first paint of {path}", painted, "ms", 1000))
            for explorer in HANDLES:
                if f'data-explorer="{explorer}"' in text:
                    page.locator(f'[data-explorer="{explorer}"][data-ready]').wait_for()
                    slow = np.quantile(time_drag(page, explorer), 0.95)
                    words = f"{path}, {explorer}: 95th percentile of a redraw"
                    rows.append((words, slow, "ms", 33 if explorer == "atlas" else 50))
            page.close()
    for name, path in sorted(tables.items()):
        size = len(gzip.compress(path.read_bytes())) / 1000
        rows.append((f"table of {name}, gzipped", size, "kB", 1000 if name == "atlas" else 300))
    table = pd.DataFrame(rows, columns=["what", "measured", "unit", "at most"])
    print(table.round(1).to_string(index=False))


if __name__ == "__main__":
    main()
