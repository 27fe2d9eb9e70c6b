"""The drawn diagrams: clean SVG that reads on a phone, and a caption for each."""

import re
from xml.etree import ElementTree

import pytest

from cmp.parsing import read_yaml
from lab import chapters

FOLDER = chapters.BOOK / "diagrams"
DRAWN = sorted(FOLDER.glob("*.svg"))
CAPTIONS = read_yaml(FOLDER / "captions.yaml")
SVG = "{http://www.w3.org/2000/svg}"
MIN_TEXT = 15
"""Units of a viewBox that is 720 wide, so that text is legible at half that width."""
MAX_BYTES = 12_000
FORBIDDEN = {"script", "image", "foreignObject", "style", "font", "use"}


def each_diagram(function):
    return pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)(function)


def parse(path):
    return ElementTree.fromstring(path.read_bytes())


def test_every_diagram_has_a_caption_and_every_caption_a_diagram():
    assert DRAWN
    assert set(CAPTIONS) == {path.stem for path in DRAWN}
    for name, words in CAPTIONS.items():
        assert set(words) == {"title", "caption", "alt"}, name
        assert words["caption"].endswith("."), name


@each_diagram
def test_title_and_description_are_those_of_the_captions(path):
    root, words = parse(path), CAPTIONS[path.stem]
    assert root.findtext(f"{SVG}title") == words["title"]
    assert root.findtext(f"{SVG}desc") == words["alt"]


@each_diagram
def test_it_is_small_and_refers_to_nothing_outside(path):
    assert path.stat().st_size < MAX_BYTES
    for element in parse(path).iter():
        assert element.tag.removeprefix(SVG) not in FORBIDDEN
        assert "style" not in element.attrib
        for name, value in element.attrib.items():
            assert not name.endswith("href") and not name.startswith("on"), (name, value)
            assert all(link.startswith("#") for link in re.findall(r"url\((.*?)\)", value)), value


@each_diagram
def test_its_page_is_opaque_and_720_wide(path):
    root = parse(path)
    width, height = root.get("viewBox").split()[2:]
    assert width == "720" and float(height) <= 420
    page = root.find(f"{SVG}rect")
    shown = (page.get("width"), page.get("height"), page.get("fill"))
    assert shown == (width, height, "#ffffff")


@each_diagram
def test_no_text_is_too_small_to_read(path):
    sizes = [element.get("font-size") for element in parse(path).iter()]
    assert sizes[0] is not None, "the root sets the size of all text"
    assert all(float(size) >= MIN_TEXT for size in sizes if size is not None)
