"""The book on paper: one page out of all, with its links inside, and a card that fits one sheet."""

import os
import re
import shutil

import pytest

from cmp.errors import CmpError
from cmp.releases import tuning
from lab import printing, values

PAGE = re.compile(rb"/Type\s*/Page[^s]")


def test_the_whole_book_is_one_page_whose_links_lead_inside(pages):
    text = printing.whole_book(pages)
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert {*re.findall(r'href="#([^"]+)"', text)} - set(names) == set()
    assert not re.search(r'href="/(?!vendor|myst-theme)', text)
    assert "<details open" in text and not re.search(r"<details(?! open)", text)
    assert 'loading="lazy"' not in text and "<script src" not in text
    assert 'data-chapter="04"' in text and 'id="out-of-date"' in text


def test_without_a_browser_printing_says_what_to_install(pages, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CmpError, match="install chromium"):
        printing.print_book(pages)


def test_a_browser_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    hanging = tmp_path / "chromium"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(printing, "find_browser", lambda: str(hanging))
    monkeypatch.setattr(printing, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(CmpError, match=r"chromium did not end in 0\.1 seconds"):
        printing.print_page(tmp_path, "card", "a page")
    assert not (tmp_path / "print-card.html").exists()


@pytest.fixture
def browser():
    if not printing.find_browser():
        assert os.environ.get("REQUIRE_BROWSER") != "1"
        pytest.skip("there is no browser")


def test_the_card_fits_one_sheet_and_has_its_numbers(browser, pages, tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    card = printing.print_page(pages, "card", printing.card_page())
    content = card.read_bytes()
    assert content.startswith(b"%PDF") and len(PAGE.findall(content)) == 1
    assert "{{" not in printing.card_page() and "<td" in printing.card_page()
    assert not (pages / "print-card.html").exists()


@pytest.mark.defect
def test_the_card_gives_the_peaks_that_tuning_tries():
    said = re.findall(r"three peaks, a factor of (\w+) apart", printing.card_page())
    assert [values.NUMBERS[int(tuning.FACTOR)]] == said


@pytest.mark.long
def test_the_book_prints_with_its_figures(browser, pages, tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    book = printing.print_page(pages, "book", printing.whole_book(pages)).read_bytes()
    assert len(PAGE.findall(book)) > 100
    assert len(re.findall(rb"/Subtype\s*/Image", book)) > 30
