"""Check the prose of the README and the book: `python -m tests.prose [--counts] [FILE]...`.

Private words are errors. Long sentences, sentences with many quantities, and measured values that
were typed are warnings. Only prose counts: no code, front matter, tables, formulas, addresses,
roles, or syntax of directives. `book/STYLE.md` says how sentences are written.

With `--counts`, a table says instead how long the lesson of each chapter is, and what it holds.
"""

import ast
import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MAX_WORDS = 35
MAX_QUANTITIES = 4

_UNITS = (
    "(?:class|task|update|step|dataset|chapter|cell|card|setting|run|room|concept|key|side|stream)"
)
_COUNT = r"(?:\d+|two|three|four|five|six|eight|ten|twelve|twenty|forty|hundred|thousand)"
_PER = "per, not a"
PRIVATE_WORDS = {
    r"whoever": "anyone who, or name the person",
    r"told": "stated, printed, or say who states it",
    r"tells? (?:little|less|more|nothing)|(?<!close to )tells?(?=[.,;:])": "shows",
    r"embarrass\w*": "contradict, refute",
    r"prices? of (?:a|an|the|one|this|each) trade(?:-off)?": "what a gain costs",
    r"better prices?": "a better trade-off",
    r"the ways? there(?! (?:is|are|was|were))": "the trajectory",
    r"(?:is|are|was|were) not seen(?=[.,;:]| within| here| there)": "is within the error",
    r"sees? (?:no|a|any) difference": "finds no difference",
    r"(?<!time )(?:go|goes|went) by": "is based on",
    r"on the whole(?! (?:test|split|batch|set|stream|model|pool|image|data|tower)s?)": "leave out",
    r"so manieth|manieth": "nth",
    r"(?:has|have|had) (?:its|their) room": "say what it costs",
    r"the more so": "the more",
    r"nought": "zero",
    r"otherwise than": "differently from",
    r"(?:do|does|did) otherwise": "do differently",
    r"taken over(?=[.,;:])": "kept, copied",
    r"bears? no verdict|grounds of a choice": "is not used for verdicts",
    r"(?:reported|published|counted|shown|judged) apart": "separately",
    r"knobs? of (?:a|one) trade(?:-off)?": "two ways to trade one for the other",
    rf"(?:images|folders?|steps|hours|palettes?|epochs?|one|two|three) an? {_UNITS}": _PER,
    rf"(?:an?|one) (?:cell|colour|copy|idea|line|pass|prompt|run) an? {_UNITS}": _PER,
    r"\d+\s%(?!\w)": "no space before the sign, as in 40%",
    rf"{_COUNT} (?:cells|copies|lines|passes|prompts|runs|samples) an? {_UNITS}": _PER,
    rf"(?:once|twice) an? {_UNITS}(?=[.,;:)])": _PER,
}
"""Phrase of the first edition, as a pattern -> what to write instead."""
_PRIVATE = {
    re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.I): instead
    for pattern, instead in PRIVATE_WORDS.items()
}

QUANTITY, WORD = "\ue000", "\ue001"
"""What stands for a measured value that is filled in, and for code or a formula."""

_NUMBER = (
    rf"(?:{QUANTITY}|(?<![\w@./-])[+−±~-]?\d+(?:[.,]\d+)*(?:·10\S+)?(?:\s?%|[kMGT×x])?(?![\w@/-]))"
)
_RANGE = rf"{_NUMBER}(?:\s*(?:to|±|–|×|x|/|-)\s*{_NUMBER})*"
_UNIT = r"(?:\s[a-z]+){0,2}"
_QUANTITIES = re.compile(rf"{_RANGE}(?:{_UNIT}\s\((?:\d+\s?%\s)?(?:[a-z]+\s)*{_RANGE}\))?")
_REFERENCE = re.compile(
    r"\b(?:chapters?|appendix|sections?|tables?|tab\.|figures?|fig\.|equations?|eq\.|exercises?"
    r"|study|studies|version|lines?|seed|base|task|update|replicate|stage|status|python|numpy"
    r"|arxiv|neurips|iclr|icml|cvpr|eccv|acl|apache)"
    r"\s+\d[\d.]*(?:(?:,| and| to| or|–|-)\s?\d+)*",
    re.I,
)
_MEASURE = r"(?:A_KA|A_ZS|GM|geometric mean)"
_TYPED = re.compile(
    rf"{_NUMBER}\s(?:%|points?|percent)?\s?(?:of|in|more|less)?\s?{_MEASURE}"
    rf"|{_MEASURE}(?:\s(?:is|was|of|at|by|to|from|rises|falls|gains|loses|differs|only|about)){{0,4}}"
    rf"\s[+−-]?\d+(?:\.\d+)?(?![\w@/-])"
    rf"|(?<![\w@./-])[+−-]?\d+\.\d+\spoints?\b"
)

_ALWAYS_SHORT = {"e.g", "i.e", "cf", "vs", "approx", "ca", "resp"}
_SHORT_BEFORE_DIGITS = {"fig", "figs", "eq", "sec", "tab", "no", "ch", "pp", "p", "vol"}
_BEFORE_INITIALS = {"by", "and", "of", "&", "with"}
_END = re.compile(r"[.!?…]+[)\]\"'”’*_]*(?=\s|$)")


class Sentence(NamedTuple):
    """A sentence, a heading or an item.

    Attributes:
        line: The line that it begins in, from 1.
        text: Its text, where `WORD` stands for code and formulas and `QUANTITY` for a value that
            is filled in.
    """

    line: int
    text: str

    @property
    def words(self) -> int:
        """How many words it has; code or a formula is one."""
        return sum(any(c.isalnum() or c in (WORD, QUANTITY) for c in w) for w in self.text.split())

    @property
    def quantities(self) -> int:
        """How many quantities it has: a range, or an estimate with its interval, is one."""
        return len(_QUANTITIES.findall(_REFERENCE.sub(WORD, self.text)))


class Finding(NamedTuple):
    """What is to be mended in a sentence.

    Attributes:
        line: The line that the sentence begins in.
        is_error: Whether it is an error, or else a warning.
        message: What it is.
    """

    line: int
    is_error: bool
    message: str


def mask_markup(text: str) -> str:
    """Replace what is no prose by spaces, so that every word keeps its place and its line."""

    def spaces(text: str) -> str:
        return re.sub(r"[^\n]", " ", text)

    def blank(match: re.Match[str], stands: str = "") -> str:
        return stands + spaces(match[0])[len(stands) :]

    def filled(match: re.Match[str]) -> str:
        return blank(match, WORD if match["kind"] in ("verdict", "reading") else QUANTITY)

    def label(match: re.Match[str]) -> str:
        before, _, after = match[0].partition(match["label"])
        return spaces(before) + match["label"] + spaces(after)

    text = re.sub(r"\A---\n.*?\n---\n", blank, text, flags=re.S)
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.S)
    opening = r"^([ ]*)(`{3,}|~{3,})(?:[\w+-]*|\{(?:code|math|include|raw)[\w-]*\}[^\n]*)\n"
    text = re.sub(rf"{opening}.*?^\1\2`*[ ]*$", blank, text, flags=re.S | re.M)
    text = re.sub(r"^\+\+\+.*$", blank, text, flags=re.M)  # where a cell begins
    text = re.sub(r"^\s*(?:`{3,}|:{3,}).*$", blank, text, flags=re.M)  # directives
    text = re.sub(r"^\s*:[\w-]+:.*$", blank, text, flags=re.M)  # their options
    text = re.sub(r"^\s*\|.*$", blank, text, flags=re.M)  # tables
    text = re.sub(r"^\([\w-]+\)=$", blank, text, flags=re.M)  # labels
    text = re.sub(r"\$\$.+?\$\$", blank, text, flags=re.S)
    text = re.sub(r"\{\{(?P<kind>\w+) [^{}]+\}\}", filled, text)
    text = re.sub(r"\{[\w:-]+\}`[^`]*`", lambda m: blank(m, WORD), text)  # roles
    text = re.sub(r"(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", lambda m: blank(m, WORD), text,
                  flags=re.S)  # fmt: skip
    text = re.sub(r"(?<![\w$\\])\$(?!\s)[^$]+?(?<!\s)\$(?!\d)", lambda m: blank(m, WORD), text)
    text = re.sub(r"!?\[(?P<label>[^\[\]]*)\]\([^()\s]*\)", label, text)
    return re.sub(r"<?https?://[^\s>)]+>?", lambda m: blank(m, WORD), text)


def split_sentences(text: str) -> list[Sentence]:
    """Return the sentences of a Markdown text."""
    masked = mask_markup(text)
    starts = [0, *(match.end() for match in re.finditer(r"\n", masked))]
    return [
        Sentence(bisect_right(starts, start + first), " ".join(block[first:last].split()))
        for start, block in _blocks(masked)
        for first, last in _spans(block)
    ]


def _blocks(masked: str) -> Iterator[tuple[int, str]]:
    """Yield paragraphs, headings, items and definitions, with their places; markers are blank."""
    place, begun, block = 0, 0, ""
    marker = re.compile(r"^\s*(?:#+\s|[*+-]\s|\d+\.\s|:\s|>\s?)+")
    for line in [*masked.splitlines(keepends=True), ""]:
        head = marker.match(line)
        if block.strip() and (head or not line.strip()):
            yield begun, block
            block = ""
        if not block:
            begun = place
        block += " " * len(head[0]) + line[len(head[0]) :] if head else line
        place += len(line)
        if head and line.lstrip().startswith("#"):
            yield begun, block
            block = ""
    if block.strip():
        yield begun, block


def _spans(block: str) -> Iterator[tuple[int, int]]:
    """Yield where each sentence of a block begins and ends."""
    first = 0
    for match in _END.finditer(block):
        if match.end() < len(block.rstrip()) and not _ends(block, match):
            continue
        yield first + len(block[first:]) - len(block[first:].lstrip()), match.end()
        first = match.end()
    if block[first:].strip(" \n*_"):
        yield first + len(block[first:]) - len(block[first:].lstrip()), len(block)


def _ends(block: str, match: re.Match[str]) -> bool:
    """Whether a mark with more text behind it ends a sentence."""
    mark, after = match[0], block[match.end() :].lstrip().lstrip("\"'“‘([*_")
    if after[:1].islower() and (mark.startswith(("...", "…")) or mark[0] in "!?"):
        return False  # a quotation or a gap that the sentence goes on after
    if mark[0] != ".":
        return True
    before = block[: match.start()].split()
    word = before[-1].lstrip("\"'“‘([*_") if before else ""
    if word.lower() in _ALWAYS_SHORT:
        return False
    if word.lower() in _SHORT_BEFORE_DIGITS:
        return not after[:1].isdigit()
    if word.lower() in ("al", "etc", "s.e", "a.m", "p.m", "u.s"):
        return not after[:1].islower()
    if len(word) == 1 and word.isupper():  # the initial of a name, or of a thing called P
        previous = before[-2] if len(before) > 1 else ""
        is_initial = not previous or previous.lower() in _BEFORE_INITIALS
        return not (is_initial or previous.endswith((",", ".", "(", ";")))
    return True


def check_text(text: str, measured: bool = False) -> list[Finding]:
    """Return what is to be mended in a text.

    Args:
        text: Markdown.
        measured: Whether its measured values must be filled in.
    """
    findings = []
    for sentence in split_sentences(text):
        begins = " ".join(sentence.text.replace(QUANTITY, "N").replace(WORD, "_").split()[:8])
        for pattern, instead in _PRIVATE.items():
            for match in pattern.finditer(sentence.text):
                findings.append(
                    Finding(sentence.line, True, f"private word {match[0]!r}: {instead}")
                )
        if sentence.words > MAX_WORDS:
            findings.append(Finding(sentence.line, False, f"{sentence.words} words: {begins} ..."))
        if sentence.quantities > MAX_QUANTITIES:
            message = f"{sentence.quantities} quantities: {begins} ..."
            findings.append(Finding(sentence.line, False, message))
        match = _TYPED.search(sentence.text) if measured else None
        if match and QUANTITY not in match[0]:
            message = f"typed value {match[0]!r}: fill it in as {{{{...}}}}"
            findings.append(Finding(sentence.line, False, message))
    return findings


EVIDENCE = "\n## Evidence\n"
"""The heading of a chapter's last section, which is folded; what stands above it is the lesson."""
INTERVALS = {"verdict": 2}
"""Kind of mark -> the number of intervals in what stands for it, where it is not 1."""
_MARK = re.compile(r"\{\{(?P<kind>\w+) [^{}]+\}\}")
_BARE = ("about", "bases", "caption", "diagram", "mirror", "n", "peak", "points", "ref")
"""Kinds of marks without an interval."""
_BRACKETS = re.compile(r"\([^()]*?[+−-]?\d+(?:\.\d+)?\sto\s[+−-]?\d+(?:\.\d+)?[^()]*\)")
_CELL = re.compile(
    r"^```\{code-cell\}[^\n]*\n(?P<options>(?::[^\n]*\n)*)(?P<code>.*?)^```$", re.S | re.M
)
RESULT = re.compile(r"figures\.plot_(?!gallery|wall|changing_names|flips)")
"""A call that draws a figure of results; galleries of pictures are none."""
OWN_RUN = "plot_among_runs"
"""The figure of a reader's own run, which is no result of the book."""


class Counts(NamedTuple):
    """What the lesson of a chapter is made of.

    Attributes:
        words: The words of its prose, with boxes, captions and exercises.
        intervals: The bracketed intervals in it.
        figures: The figures of results that its cells draw.
        evidence: The words of the evidence below it, or 0 if there is none.
    """

    words: int
    intervals: int
    figures: int
    evidence: int


def split_lesson(text: str) -> tuple[str, str]:
    """Return the lesson of a chapter and its evidence, which is "" if it has none."""
    lesson, _, evidence = text.partition(EVIDENCE)
    return lesson, evidence


def code_cells(text: str) -> list[str]:
    """Return the code of a chapter's cells after its parameters."""
    cells = [match for match in _CELL.finditer(text) if "parameters" not in match["options"]]
    return [match["code"] for match in cells]


def count_intervals(text: str) -> int:
    """Return the number of bracketed intervals in a text, in marks or typed."""
    kinds = [match["kind"] for match in _MARK.finditer(text)]
    marked = sum(INTERVALS.get(kind, 1) for kind in kinds if kind not in _BARE)
    return marked + len(_BRACKETS.findall(_MARK.sub("", text)))


def count_chapter(text: str) -> Counts:
    """Return what the lesson of a chapter is made of."""
    lesson, evidence = split_lesson(text)
    masked = re.sub(r"\A---\n.*?\n---\n|^```.*?^```$", "", lesson, flags=re.S | re.M)
    return Counts(
        words=sum(sentence.words for sentence in split_sentences(lesson)),
        intervals=count_intervals(masked),
        figures=sum(
            bool(RESULT.search(cell)) and OWN_RUN not in cell for cell in code_cells(lesson)
        ),
        evidence=sum(sentence.words for sentence in split_sentences(evidence)),
    )


def print_counts(files: Sequence[Path]) -> None:
    """Print what the lessons of chapters are made of."""
    print(f"{'chapter':24}" + "".join(f"{name:>12}" for name in Counts._fields))
    for path in files or [each for each in default_files() if is_chapter(each)]:
        found = count_chapter(path.read_text(encoding="utf-8"))
        print(f"{path.stem:24}" + "".join(f"{value or 'none':>12}" for value in found))


def is_chapter(path: Path) -> bool:
    """Return whether a file is a chapter, whose measured values must be filled in."""
    return re.match(r"\d\d_|A\d_", path.name) is not None


def default_files() -> list[Path]:
    """Return the texts of the project that readers of the book see."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]


def code_files() -> list[Path]:
    """Return the modules whose docstrings, comments and messages people read."""
    return [path for tree in ("cmp", "book/lab", "tests") for path in (ROOT / tree).rglob("*.py")]


def check_file(path: Path) -> list[Finding]:
    """Return what is to be mended in a text, or the private words of a module."""
    text = path.read_text(encoding="utf-8")
    return check_code(text) if path.suffix == ".py" else check_text(text, is_chapter(path))


def check_code(text: str) -> list[Finding]:
    """Return the private words in the docstrings, strings and comments of a module."""
    said = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    said += [(each.start[0], each.string[1:]) for each in tokens if each.type == tokenize.COMMENT]
    return [
        finding._replace(line=start + finding.line - 1)
        for start, words in sorted(said)
        for finding in check_text(words, False)
        if finding.is_error
    ]


def main(files: Sequence[Path]) -> int:
    """Print what is to be mended in each file, and counts; return 1 if there is an error."""
    total, summary = 0, []
    for path in files or default_files():
        findings = check_file(path)
        for line, is_error, message in findings:
            print(f"{path}:{line}: {'error' if is_error else 'warning'}: {message}")
        errors = sum(finding.is_error for finding in findings)
        words = [s.words for s in split_sentences(path.read_text(encoding="utf-8"))]
        mean = sum(words) / max(1, len(words))
        counts = f"{errors:6} {len(findings) - errors:8} {len(words):9} {mean:10.1f}"
        summary.append(f"{path.name:36}{counts}")
        total += errors
    print(f"\n{'file':36}{'errors':>6} {'warnings':>8} {'sentences':>9} {'mean words':>10}")
    print("\n".join(summary))
    return min(total, 1)


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:] if name != "--counts"]
    if "--counts" in sys.argv[1:]:
        print_counts(given)
    else:
        sys.exit(main(given))
