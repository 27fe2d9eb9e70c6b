"""What the text of chapters leaves out: published values, diagrams and the numbers of figures."""

import re

import nbformat
import pandas as pd
import pytest
import synthetic
from scipy import stats

from cmp.errors import CmpError
from cmp.parsing import read_yaml
from lab import chapters, values
from lab.evidence import claims, studies, verdicts
from lab.evidence.claims import FAMILIES, ClaimsFile, FrontOf
from lab.evidence.claims import load_claims as load_real_claims
from lab.evidence.scores import claims_level, study_trajectory
from tests import front_door

CONDITION = re.compile(r"(?P<mark>[^<>]+?) (?P<sign>[<>]|includes|excludes) (?P<other>[^<>]+)")
READING = re.compile(r"claim (?P<claim>.+) is (?P<reading>[\w, ]+)")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Two made-up studies, and one that is not published."""
    folder = tmp_path_factory.mktemp("book")
    with pytest.MonkeyPatch.context() as patch:
        synthetic.place(patch, folder)
        synthetic.write_study("front", synthetic.FRONT)
        synthetic.write_study("merging", {"EMA": {"schedule.peak": 0.002}})
        synthetic.write_study("later", {"EMA": {}})
        synthetic.write_study("partial", {"EMA": {}}, replicates=2)
        synthetic.publish("partial", {"EMA": (45, 54)})
        synthetic.write_study("partial", {"EMA": {}, "outer": {}})
        synthetic.write_study("alone", {"EMA": {"replicates": 3, "seeds.init": 0}})
        synthetic.publish("alone", {"EMA": (45, 54)})
        synthetic.publish("front", synthetic.ENDS)
        synthetic.publish("merging", {"EMA": (45, 54)})
    return folder


@pytest.fixture
def published(book, monkeypatch):
    """That book is the one that is read."""
    synthetic.place(monkeypatch, book)
    known = ClaimsFile((), {"plain": FrontOf("front", tuple(synthetic.FRONT))})
    monkeypatch.setattr(claims, "load_claims", lambda *_: known)


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text) for text in cells])


def filled(*cells, number="03"):
    book = notebook(*cells)
    values.fill_notebook(book, number)
    return [cell.source for cell in book.cells]


def test_citations_are_links_in_every_notebook():
    works = "Merged {cite:p}`roth2024practitioner, time2024`."
    [text] = filled(works)
    assert text == (
        "Merged ([Roth et al., 2024](https://arxiv.org/abs/2408.14471); "
        "[Dziadzio et al., 2024](https://arxiv.org/abs/2412.06712))."
    )
    with pytest.raises(
        CmpError, match=r"chapter 03: .*`roth2024practitoner`: no such work .*did you mean"
    ):
        filled("By {cite:p}`roth2024practitoner`.")


def test_a_mark_may_be_broken_anywhere_and_none_is_left(published):
    [text] = filled("{{caption yours: Yours, at {{peak\nmerging/EMA}}, among\nothers.}}")
    assert text == "**Figure 3.1.** Yours, at 0.002, among\nothers."
    with pytest.raises(CmpError, match=r"chapter 03: \{\{peaks\}\}\.: not a mark"):
        filled("At {{peaks}}.")


def test_values_are_those_of_the_published_runs(published):
    scores = verdicts.published_scores("merging")[1].loc["EMA"]
    words = values.fill_values("{{A_KA merging/EMA}} of {{n merging/EMA}}")
    assert words.startswith(f"{scores['A_KA'].mean():.1f} (") and words.endswith(") of 20")
    assert float(values.fill_values("{{peak merging/EMA}}")) == scores["peak"].iloc[0]
    front = claims.load_claims().fronts["plain"]
    gain = verdicts.gain_of("merging", "EMA", front).values.mean()
    assert values.fill_values("{{gain merging/EMA}}").startswith(f"{gain:+.1f} (")
    less = verdicts.gain_of("merging", "EMA", front, less=1.0).values.mean()
    assert less < gain
    assert values.fill_values("{{gain_less merging/EMA}}").startswith(f"{less:+.1f} (")
    same = values.fill_values("{{difference A_ZS merging/EMA - merging/EMA}}")
    assert same == "+0.0 (0.0 to 0.0)"
    assert values.fill_values("{{about A_KA merging/EMA}}") == f"{scores['A_KA'].mean():.0f}"


def test_intervals_of_a_text_have_the_level_of_the_claims(published):
    front = claims.load_claims().fronts["plain"]
    gain = verdicts.gain_of("merging", "EMA", front)
    error = gain.pseudo.std() / 10**0.5
    half = error * stats.t.isf((1 - claims_level()) / 2, 9)
    low, high = gain.values.mean() - half, gain.values.mean() + half
    assert values.fill_values("{{gain merging/EMA}}").endswith(f"({low:.1f} to {high:.1f})")


def test_scores_before_a_stream_are_those_of_its_bases():
    start = study_trajectory("mixtures").query("task == 0 and setting == 'thirds'")
    mean = start.query("scope == 'full'")["A_ZS"].mean()
    assert values.fill_values("{{before A_ZS mixtures/thirds}}").startswith(f"{mean:.1f} (")
    with pytest.raises(CmpError, match="no measure 'colour'; the measures are A_KA"):
        values.fill_values("{{before colour mixtures/thirds}}")


def test_a_local_gain_is_over_the_front_of_as_many_updates_and_steps():
    front = load_real_claims().fronts["160 steps"]
    gain = verdicts.gain_of("scaling", "160 steps, EMA", front).values.mean()
    words = values.fill_values("{{local_gain scaling/160 steps, EMA}}")
    assert words.startswith(f"{gain:+.1f} (")
    with pytest.raises(CmpError, match="no front 'EMA'; the fronts are plain, 160 steps"):
        values.fill_values("{{local_gain merging/EMA}}")


def test_a_study_with_one_front_needs_no_name_of_it(published):
    words = values.fill_values("{{local_gain front/plain, peak 0.0004}}")
    assert words == "+0.0 (0.0 to 0.0)"  # it lies on this front


def test_runs_of_another_kind_have_no_gain():
    """Another number of updates, here; or another network, or another size of batches."""
    with pytest.raises(CmpError, match=r"40 updates, batches of 64.* 20 updates.* same kind"):
        values.fill_values("{{gain scaling/40 x 20, EMA}}")


def test_sizes_are_words_without_a_sign(published):
    front = claims.load_claims().fronts["plain"]
    gain = verdicts.gain_of("merging", "EMA", front).values.mean()
    assert values.fill_values("{{points gain merging/EMA}}") == values.in_points(-gain)
    sizes = [0.1, 0.25, -0.4, 0.8, -1.3, 1.8, -11.2, 12.6, 18.8]
    assert [values.in_points(size) for size in sizes] == [
        "a fraction of a point", "half a point", "half a point", "one point",
        "one and a half points", "two points", "eleven points", "13 points", "19 points",
    ]  # fmt: skip


def holds(condition: str) -> bool:
    """Return whether a condition on measured values is true.

    Args:
        condition: "MARK < OTHER", "MARK > OTHER", or, for the interval of a value, "MARK includes
            OTHER" or "MARK excludes OTHER". MARK is what `values.estimate` takes, and OTHER is a
            number or another mark. Or "claim NAME is READING", for the verdict on a claim.

    Raises:
        CmpError: The condition has another form, or a mark refers to nothing.
    """
    if judged := READING.fullmatch(condition):
        return str(values._claim(judged["claim"])["reading"]) == judged["reading"]
    parts = CONDITION.fullmatch(condition)
    if not parts:
        words = "expected MARK <, >, includes or excludes OTHER, or claim NAME is READING"
        raise CmpError(f"{condition!r}: {words}")
    one, _ = values.estimate(parts["mark"])
    try:
        other = float(parts["other"])
    except ValueError:
        other = values.estimate(parts["other"])[0].value
    if parts["sign"] in "<>":
        return one.value < other if parts["sign"] == "<" else one.value > other
    return (one.low <= other <= one.high) == (parts["sign"] == "includes")


def test_conditions_are_about_estimates_and_intervals(published):
    mean = verdicts.published_scores("merging")[1].loc["EMA"]["A_KA"].mean()
    assert holds(f"A_KA merging/EMA < {mean + 1}")
    assert not holds(f"A_KA merging/EMA > {mean + 1}")
    assert holds(f"A_KA merging/EMA includes {mean}")
    assert holds("A_KA merging/EMA excludes 0")
    assert holds("difference A_KA merging/EMA - merging/EMA includes 0")
    assert not holds("A_ZS merging/EMA < A_ZS merging/EMA")
    with pytest.raises(CmpError, match="expected MARK <, >, includes or excludes OTHER"):
        holds("A_KA merging/EMA = 3")


SENTENCES = read_yaml(chapters.BOOK / "sentences.yaml")
"""What chapters say in words about measured values, and when it is true."""


@pytest.mark.parametrize("number", SENTENCES)
def test_what_chapters_say_in_words_holds(number):
    text = " ".join(chapters.source_text(chapters.chapters()[number]).replace("\n> ", "\n").split())
    for sentence in SENTENCES[number]:
        assert sentence["says"] in text, f"chapter {number} no longer says: {sentence['says']}"
        for condition in sentence["when"]:
            words = f"{condition} no longer holds: rewrite {sentence['says']!r}"
            assert holds(condition), f"chapter {number}: {words}"


def test_what_chapter_03_says_of_the_months_before_the_end():
    """Differences of EMA-Merge from plain fine-tuning and its rivals over all updates."""
    text = " ".join(chapters.chapters()["03"].read_text("utf-8").split())
    assert "Averaged over a stream's twenty models, the gain is about the same" in text
    assert 'three points more than "average deployed" and learns one point of A_KA less' in text
    assert "EMA-Merge learns one point more and keeps about as much" in text
    served = pd.concat(map(study_trajectory, ["merging", "front"]))
    served = served.query("scope == 'subset' and task > 0")
    means = served.groupby("setting")[["A_KA", "A_ZS"]].mean()
    rivals = {"check": (0, 4.7), "average deployed": (-1, 3), "merged at the end, 3 to 1": (1, 0.5)}
    for rival, apart in rivals.items():
        assert (means.loc["EMA"] - means.loc[rival]).tolist() == pytest.approx(apart, abs=0.5)


def test_what_lacks_streams_is_preliminary(published):
    words = values.fill_values("{{gain partial/EMA}}")
    assert words.endswith(" (preliminary, 2 of 20 streams)")
    words = values.fill_values("{{difference A_KA partial/EMA - merging/EMA}}")
    assert words.endswith(" (preliminary, 2 of 20 streams)")
    words = values.fill_values("{{difference A_KA alone/EMA - merging/EMA}}")
    assert words.endswith(" (3 streams of one base)")
    assert values.fill_values("{{A_KA partial/outer}}") == values.NOT_YET
    assert values.fill_values("{{difference A_KA partial/outer - partial/EMA}}") == values.NOT_YET


def test_what_is_not_published_is_said(published):
    for mark in ("{{A_KA later/EMA}}", "{{gain later/EMA}}", "{{n later/EMA}}"):
        assert values.fill_values(mark) == values.NOT_YET


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("{{A_KA merging/SLERP}}", "no setting 'SLERP'; its settings are EMA"),
        ("{{A_KA merging}}", "expected study/setting"),
        ("{{colour merging/EMA}}", "no such value; the values are A_KA"),
        ("{{difference A_KA merging/EMA}}", "expected `difference MEASURE"),
    ],
)
def test_marks_that_name_nothing_are_refused(published, mark, words):
    with pytest.raises(CmpError, match="chapter 03: ") as refused:
        values.fill_values(mark, "chapter 03: ")
    assert words in str(refused.value)


def test_figures_are_numbered_as_they_come_whoever_refers_to_them():
    cells = filled(
        "See {{ref gains}} and {{ref basin}}.",
        "{{diagram basin}}",
        "{{caption gains: As {{ref basin}}.}}",
    )
    assert cells[0] == "See Figure 3.2 and Figure 3.1."
    picture, _, caption = cells[1].partition("\n\n")
    assert picture.startswith("![")
    assert picture.endswith("(diagrams/basin.svg)")
    assert caption.startswith("**Figure 3.1.** ")
    assert cells[2] == "**Figure 3.2.** As Figure 3.1."
    assert filled("{{caption a: What.}}", number="A1") == ["**Figure A1.1.** What."]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["{{ref nothing}}"], "unknown; "),
        (["{{diagram nothing}}"], "unknown; "),
        (["{{caption a: One.}}", "{{caption a: Two.}}"], "used twice"),
    ],
)
def test_figures_that_cannot_be_numbered_are_refused(cells, words):
    with pytest.raises(CmpError, match=words):
        filled(*cells)


def test_code_cells_stay_as_they_are():
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = '{{ref nothing}}'")])
    values.fill_notebook(book, "03")
    assert book.cells[0].source == "x = '{{ref nothing}}'"


def test_the_answer_goes_between_its_marks(monkeypatch, tmp_path):
    monkeypatch.setattr(values, "fill_values", lambda text, source: "Merge.\n")
    page = f"# Title\n{front_door.BEGIN}\nold\n{front_door.END}\nrest"
    new = front_door.with_answer(page, "page")
    assert new == f"# Title\n{front_door.BEGIN}\n\nMerge.\n\n{front_door.END}\nrest"
    assert front_door.with_answer(new, "page") == new
    with pytest.raises(CmpError, match="page: expected"):
        front_door.with_answer("# Title", "page")


def test_every_page_opens_with_the_answer():
    for page in front_door.PAGES:
        text = page.read_text(encoding="utf-8")
        assert front_door.with_answer(text, str(page)) == text


def test_every_mark_of_a_chapter_names_a_setting_or_a_claim():
    """Also of studies that are not published yet."""
    names = {claim.name for path in FAMILIES for claim in load_real_claims(path).claims}
    cells = [cell for source in chapters.select() for cell in chapters.notebook(source).cells]
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    texts += [page.read_text(encoding="utf-8") for page in (chapters.BOOK / "lab").glob("*.md")]
    for match in (match for text in texts for match in values.MARK.finditer(text)):
        kind, what = match["kind"], " ".join(match["what"].split())
        assert kind in values.KINDS, match[0]
        if kind == "verdict":
            assert what in names, match[0]
            continue
        if kind == "spread":  # a wrong one raises
            values.fill_values(match[0])
            continue
        if kind in ("about", "points"):
            kind, _, what = what.partition(" ")
            assert kind in (*values.KINDS, "kept", "lacking"), match[0]
            if kind == "spread":
                values.fill_values(match[0])
                continue
        if kind in ("difference", "before"):
            what = what.partition(" ")[2]
        pair = what.split(" - ") if kind == "difference" else [what]
        assert len(pair) == 1 + (kind == "difference"), match[0]
        for name in pair:
            study, _, setting = name.partition("/")
            assert setting in studies.load_study(study).settings, match[0]
