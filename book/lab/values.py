"""Fill in what the text of chapters leaves open: measured values, diagrams, figure numbers, works.

A chapter's source contains `{{gain merging/EMA}}`, and its notebook "+4.9 (3.1 to 6.7)", or "+4.9
(preliminary, 2 of 20 streams)" before all are published. So no measured value is ever typed, and
the text follows when a value changes.
"""

import functools
import re
from typing import Any

import pandas as pd

from cmp.errors import CmpError, name_choices
from cmp.parsing import read_yaml
from lab import analyses, chapters
from lab.evidence import claims, guidelines, verdicts
from lab.evidence.claims import MATTERS
from lab.evidence.fronts import OutsideFrontError
from lab.evidence.scores import (
    MEASURES,
    Estimate,
    estimate_from_bases,
    estimate_mean,
    planned_streams,
    setting_estimates,
    study_trajectory,
)

DIAGRAMS = chapters.BOOK / "diagrams"
FIGURE = re.compile(r"\{\{(?P<kind>diagram|caption) (?P<label>[\w-]+)(?:: (?P<text>[^{}]+))?\}\}")
LABEL = re.compile(r"\{\{(?:diagram|caption) ([\w-]+)")
REFERENCE = re.compile(r"\{\{(?P<kind>ref) (?P<label>[\w-]+)\}\}")
MARK = re.compile(r"\{\{(?!diagram|caption|ref)(?P<kind>[a-zA-Z_]+)\s(?P<what>[^{}]+)\}\}")
NOT_YET, NO_GAIN = "(not computed yet)", "(cannot be compared: off the front)"
CITATION = re.compile(r"\{cite:p\}`([^`]+)`")
GAINS = ("gain", "gain_less", "local_gain")
KINDS = (*MEASURES, "about", *GAINS, "difference", "before", "n", "bases",
         "peak", "points", "spread", "verdict")  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve")  # fmt: skip


def fill_notebook(notebook: Any, number: str) -> None:
    """Fill in the marks in the Markdown cells of a chapter, in place.

    Besides the values of `fill_values`, these are `{{diagram NAME}}`, a picture from `diagrams`
    with its caption; `{{caption LABEL: TEXT}}`, the caption of a figure that a cell draws; and
    `{{ref LABEL}}`, the number of either. Figures are numbered in order. Citations become links, so
    that a notebook reads well wherever it is opened.

    Args:
        notebook: An nbformat notebook.
        number: The chapter's number, such as "03".

    Raises:
        CmpError: A mark or a citation refers to nothing, or two figures have the same label.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    labels: dict[str, str] = {}
    for cell in cells:
        cell.source = fill_values(cell.source, f"chapter {number}: ")
        cell.source = link_citations(cell.source, f"chapter {number}: ")
        for match in LABEL.finditer(cell.source):
            if match[1] in labels:
                raise CmpError(f"chapter {number}: {match[0]}: the label is used twice; rename one")
            labels[match[1]] = f"Figure {number.lstrip('0') or '0'}.{len(labels) + 1}"
    captions = read_yaml(DIAGRAMS / "captions.yaml")

    def figure(match: re.Match[str]) -> str:
        label, kind = match["label"], match["kind"]
        known = captions if kind == "diagram" else labels
        if label not in known:
            raise CmpError(f"chapter {number}: {match[0]}: unknown; choose from {', '.join(known)}")
        if kind == "ref":
            return labels[label]
        text, picture = match["text"], ""
        if kind == "diagram":
            about = captions[label]
            text, picture = about["caption"], f"![{about['alt']}](diagrams/{label}.svg)\n\n"
        return f"{picture}**{labels[label]}.** {text}"

    for cell in cells:  # captions may refer to other figures
        cell.source = REFERENCE.sub(figure, cell.source)
        cell.source = FIGURE.sub(figure, cell.source)
        if left := re.search(r"\{\{.{,60}", cell.source):
            raise CmpError(
                f"chapter {number}: {left[0]}: not a mark; see `lab.values.fill_notebook`"
            )


@functools.cache
def cited_works() -> dict[str, str]:
    """Return the works in `references.bib`: key -> a link such as "[Roth et al., 2024](URL)"."""
    works = {}
    text = (chapters.BOOK / "references.bib").read_text(encoding="utf-8")
    for key, body in re.findall(r"@\w+\{([\w-]+),(.*?)\n\}", text, re.S):
        fields = dict(re.findall(r"(\w+)\s*=\s*\{(.*)\}", body))
        authors = [name.partition(",")[0] for name in fields["author"].split(" and ")]
        named = {1: "{}", 2: "{} and {}"}.get(len(authors), "{} et al.").format(*authors)
        works[key] = f"[{named}, {fields['year']}]({fields['url']})"
    return works


def link_citations(text: str, source: str = "") -> str:
    """Return a text with links in place of its citations, such as {cite:p}`KEY, KEY`.

    Args:
        text: The text.
        source: The beginning of error messages.

    Raises:
        CmpError: A work is not in `references.bib`.
    """
    works = cited_works()

    def cite(match: re.Match[str]) -> str:
        keys = [key.strip() for key in match[1].split(",")]
        for key in keys:
            if key not in works:
                choices = name_choices(key, list(works))
                raise CmpError(f"{source}{match[0]}: no such work in references.bib{choices}")
        return f"({'; '.join(works[key] for key in keys)})"

    return CITATION.sub(cite, text)


def fill_values(text: str, source: str = "") -> str:
    """Return a text with its measured values filled in.

    `{{A_KA study/setting}}`, `A_ZS`, `GM` and the parts of A_KA (`names`, `looks`, `flags`) are
    means over replicates at the end of the stream. `{{gain study/setting}}` is the gain over the
    front of plain fine-tuning, `gain_less` the same with a point of A_KA less, `local_gain` the
    same over the front of as many updates and steps. `{{difference A_KA study/setting -
    study/setting}}` is a paired difference, also available for `gain`. All have intervals over
    bases, at the level of the claims, once all streams of their study are published. `{{before A_KA
    study/setting}}` is the same mean before the stream, `{{about A_KA study/setting}}` and `{{about
    before A_KA study/setting}}` are these means as whole numbers, `{{n study/setting}}` is the
    number of replicates, and `{{bases study/setting}}` how many bases they start from, `{{peak
    study/setting}}` the peak of its learning rate. `{{points gain study/setting}}` is the size of
    an estimate in words, such as "four points", without its sign and its interval; any value that
    has an interval can stand there. `{{verdict claim}}` is the sentence of a primary claim, and
    `{{spread name, when}}` an estimate of `lab.analyses.order_estimates`. Values that are not
    published yet are marked as such.

    Args:
        text: The text.
        source: The beginning of error messages.

    Raises:
        CmpError: A mark refers to nothing.
    """

    def value(match: re.Match[str]) -> str:
        try:
            return _value(match["kind"], " ".join(match["what"].split()))
        except CmpError as error:
            raise CmpError(f"{source}{match[0]}: {error}") from error

    return MARK.sub(value, text)


def _value(kind: str, what: str) -> str:
    if kind == "verdict":
        return str(_claim(what)["sentence"])
    if kind not in KINDS:
        raise CmpError(f"no such value; the values are {', '.join(KINDS)}")
    try:
        if kind == "about":
            return f"{estimate(what)[0].value:.0f}"
        if kind == "points":
            return in_points(estimate(what)[0].value)
        if kind not in ("n", "bases", "peak"):
            found, bound = estimate(f"{kind} {what}")
            is_change = kind in ("difference", *GAINS) or what.startswith("difference")
            return bound + found.in_words("+" if is_change else "")
        table = verdicts.setting_scores(*_place(what))
    except OutsideFrontError:
        return NO_GAIN
    except verdicts.NotComputed:
        return NOT_YET
    if kind == "peak":
        return f"{table['peak'].iloc[0]:.7f}".rstrip("0")
    return str(len(table) if kind == "n" else table["base"].nunique())


def _claim(name: str) -> pd.Series:
    judged = guidelines.judged_claims(*claims.FAMILIES)
    if name not in judged.index:
        raise CmpError(f"no such claim; the claims are {', '.join(judged.index)}")
    return judged.loc[name]


def in_points(value: float) -> str:
    """Return the size of a number of points in words, such as "four points", without its sign."""
    size = abs(value)
    if size < 0.25:
        return "a fraction of a point"
    if size < 1.75:
        halves = max(round(2 * size), 1)  # the 0.5 of a quarter of a point is rounded to 0
        return ("half a point", "one point", "one and a half points")[halves - 1]
    rounded = round(size)
    return f"{NUMBERS[rounded] if rounded < len(NUMBERS) else rounded} points"


def estimate(mark: str) -> tuple[Estimate, str]:
    """Return a measured value, and whether it is a bound.

    Args:
        mark: What stands between the braces of a mark whose value has an interval, such as "gain
            merging/EMA".

    Returns:
        The estimate, and "", "at least " or "at most ".

    Raises:
        CmpError: The mark refers to nothing.
        OutsideFrontError: The front does not cover a setting.
    """
    kind, _, what = mark.partition(" ")
    if kind == "difference":
        return difference(what)
    if kind in GAINS:
        return gain(what, kind)
    if kind == "spread":
        row, _, when = what.partition(", ")
        estimates = analyses.order_estimates(when)
        if row not in estimates:
            raise CmpError(f"no spread of {row!r}; choose from {', '.join(estimates)}")
        return estimates[row], ""
    if kind == "before":
        return before(what), ""
    study, setting = _place(what)
    table = verdicts.setting_scores(study, setting)
    mean = estimate_mean(_measure(table, kind), table["base"], planned_streams(study, setting))
    return mean, ""


def difference(what: str) -> tuple[Estimate, str]:
    """Return a paired difference, "MEASURE study/setting - study/setting", and whether it is a
    bound, see `estimate`."""
    measure, _, pair = what.partition(" ")
    one, minus, other = pair.partition(" - ")
    if not minus:
        raise CmpError("expected `difference MEASURE study/setting - study/setting`")
    places = [_place(one), _place(other)]
    planned = min(planned_streams(*place) for place in places)
    if measure == "gain":
        return _difference_of_gains(places, planned)
    first, second = (verdicts.setting_scores(*place) for place in places)
    values = (_measure(first, measure) - _measure(second, measure)).dropna()
    return estimate_mean(values, first["base"], planned), ""


def _difference_of_gains(places: list[tuple[str, str]], planned: int) -> tuple[Estimate, str]:
    """Return the difference of two gains over the settings' common streams, counting the error of
    their shared front once."""
    front, replicates = claims.load_claims().fronts["plain"], analyses.shared_replicates(places)
    one, other = (verdicts.gain_of(*p, front, replicates=replicates) for p in places)
    if one.is_bound and other.is_bound:
        raise OutsideFrontError(f"{places}: both gains are bounds; their difference is unknown")
    apart, pseudo = one.values - other.values, one.pseudo - other.pseudo
    found = estimate_from_bases(float(apart.mean()), pseudo, len(apart), planned)
    return found, "at least " * one.is_bound + "at most " * other.is_bound


def gain(what: str, kind: str = "gain") -> tuple[Estimate, str]:
    """Return a gain of "study/setting", and whether it is a bound, see `estimate`.

    Args:
        what: The setting.
        kind: "gain", "gain_less" for the gain with a point of A_KA less, or "local_gain" for the
            gain over the front that the setting's name begins with, such as "160 steps", or over
            the only front of its study.

    Raises:
        CmpError: No front has this name.
        OutsideFrontError: The front does not cover the setting.
    """
    study, setting = _place(what)
    fronts = claims.load_claims().fronts
    name = setting.partition(",")[0] if kind == "local_gain" else "plain"
    of_study = [key for key, front in fronts.items() if front.study == study]
    if name not in fronts and len(of_study) == 1:
        [name] = of_study
    if name not in fronts:
        raise CmpError(f"no front {name!r}; the fronts are {', '.join(fronts)}")
    less = MATTERS if kind == "gain_less" else 0.0
    measured = verdicts.gain_of(study, setting, fronts[name], less=less)
    return verdicts.estimate_gain(study, setting, measured), "at least " * measured.is_bound


def before(what: str) -> Estimate:
    """Return the mean of "MEASURE study/setting" before the stream."""
    measure, _, place = what.partition(" ")
    study, setting = _place(place)
    verdicts.setting_scores(study, setting)  # raises an error for an unknown name
    estimates = setting_estimates(study_trajectory(study).query("task == 0"), setting)
    if measure not in estimates:
        raise CmpError(f"no measure {measure!r}; the measures are {', '.join(estimates)}")
    return estimates[measure]


def _place(what: str) -> tuple[str, str]:
    study, slash, setting = what.strip().partition("/")
    if not slash:
        raise CmpError(f"{what!r}: expected study/setting")
    return study, setting


def _measure(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table.columns:
        raise CmpError(f"no measure {name!r}")
    return table[name]
