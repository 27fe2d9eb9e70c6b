"""The verdicts once more, by another hand: from the YAML file and the Parquet files alone.

Nothing of the package is imported. `python tests/independent.py` prints the verdicts of the book.
"""

import json
import math
import sys
from pathlib import Path

import pandas as pd
import yaml
from scipy.interpolate import pchip_interpolate
from scipy.stats import t as student

EVAL, ADAPT = "eval", "adapt"


class Study:
    """The scores of a published study, by setting and replicate."""

    def __init__(self, path: Path):
        table = pd.read_parquet(path)
        self.last = table.groupby(["setting", "replicate"])["task"].max().to_dict()
        self.means = (
            table.groupby(["setting", "replicate", "task", "scope", "role"])["score"]
            .mean()
            .to_dict()
        )
        trees = table.drop_duplicates(["setting", "replicate"])
        self.trees = {
            (row.setting, row.replicate): json.loads(row.config) for row in trees.itertuples()
        }

    def replicates(self, setting: str) -> list[int]:
        return sorted(r for name, r in self.trees if name == setting)

    def base(self, setting: str, replicate: int) -> int:
        return self.trees[setting, replicate]["seeds"]["init"]

    def peak(self, setting: str) -> float:
        return next(x["schedule"]["peak"] for (name, _), x in self.trees.items() if name == setting)

    def end(self, setting: str, replicate: int, role: str, scope: str = "full") -> float:
        return self.means[setting, replicate, self.last[setting, replicate], scope, role]

    def way(self, setting: str, replicate: int) -> float:
        """The mean A_KA over the middle half of the updates."""
        total = self.last[setting, replicate]
        middle = [task for task in range(total + 1) if total <= 4 * task <= 3 * total]
        return mean([self.means[setting, replicate, task, "full", ADAPT] for task in middle])


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def deviation(values) -> float:
    values = list(values)
    centre = mean(values)
    return math.sqrt(sum((x - centre) ** 2 for x in values) / (len(values) - 1))


def pool_violators(values: list[float]) -> list[float]:
    """The nearest rising sequence, by pooling adjacent violators."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, m), (other, n) = blocks[-2:]
            blocks[-2:] = [[(one * m + other * n) / (m + n), m + n]]
    return [value for value, count in blocks for _ in range(int(count))]


def front_at(points: list[tuple[float, float]], accumulation: float) -> float:
    """The front's retention at an accumulation, NaN where it has no such low one.

    `points` are (A_KA, A_ZS) by rising peak."""
    top = max(range(len(points)), key=lambda i: points[i][0])
    gained = pool_violators([a for a, _ in points[: top + 1]])
    kept = [-z for z in pool_violators([-z for _, z in points[: top + 1]])]
    pairs = list(zip(gained, kept, strict=True))
    for place in (0, 1):  # points that tie in either score are one
        merged: dict[float, list[tuple[float, float]]] = {}
        for pair in pairs:
            merged.setdefault(pair[place], []).append(pair)
        pairs = [
            (mean(a for a, _ in group), mean(z for _, z in group)) for group in merged.values()
        ]
    x, y = zip(*pairs, strict=True)
    if accumulation < x[0]:
        return math.nan
    return float(pchip_interpolate(x, y, min(accumulation, x[-1])))


def gain(own: Study, setting: str, front: Study, spec: dict, scope: str, without=None):
    """The distance of a setting's mean scores from the front, without a base."""
    kept = [r for r in own.replicates(setting) if own.base(setting, r) != without]

    def centre(study: Study, name: str) -> tuple[float, float]:
        gained = mean(study.end(name, r, ADAPT) for r in kept)
        return gained, mean(study.end(name, r, EVAL, scope) for r in kept)

    points = [centre(front, name) for name in sorted(spec["settings"], key=front.peak)]
    is_local = spec.get("local", False)
    gained, retained = centre(own, setting)
    most = max(a for a, _ in points)
    if is_local and gained > most == points[-1][0]:  # a higher peak may gain more
        return math.nan, True
    return retained - front_at(points, gained), gained > most


def verdicts(claims: Path, results: Path) -> dict[str, tuple[float, float, float, str]]:
    """Return (estimate, low, high, reading) of every claim whose studies are published."""
    tree = yaml.safe_load(claims.read_text())
    studies = {path.stem: Study(path) for path in results.glob("*.parquet")}
    tail, found = 0.05 / 2 / len(tree["claims"]), {}
    for claim in tree["claims"]:
        measure, names = claim["measure"], claim.get("names", "all")
        scope, study = ("full" if names == "all" else names), studies.get(claim["study"])
        needed = [tree["fronts"][x.get("front", "plain")] for x in claim["terms"]]
        if measure == "gain" and any(each["study"] not in studies for each in needed):
            continue
        if study is None:
            continue
        estimate, bases, is_bound = 0.0, {}, False
        for term, spec in zip(claim["terms"], needed, strict=True):
            settings = term["of"] if isinstance(term["of"], list) else [term["of"]]
            times, replicates = term.get("times", 1.0), study.replicates(settings[0])
            base_of = {r: study.base(settings[0], r) for r in replicates}
            numbers = sorted(set(base_of.values()))
            if measure == "gain":
                front = studies[spec["study"]]
                arguments = (study, settings[0], front, spec, scope)
                whole, beyond = gain(*arguments)
                if math.isnan(whole):
                    break
                is_bound |= beyond
                parts = {b: gain(*arguments, without=b)[0] for b in numbers}
                own = {b: len(numbers) * whole - (len(numbers) - 1) * x for b, x in parts.items()}
                estimate += times * whole
            else:
                values = {}
                for r in replicates:
                    if measure == "A_ZS":
                        values[r] = study.end(settings[0], r, EVAL, scope)
                        continue
                    if measure == "GM":
                        both = study.end(settings[0], r, ADAPT) * study.end(settings[0], r, EVAL)
                        values[r] = math.sqrt(both)
                        continue
                    scores = [
                        study.way(s, r) if term.get("at") == "way" else study.end(s, r, ADAPT)
                        for s in settings
                    ]
                    values[r] = deviation(scores) if measure == "spread" else scores[0]
                own = {b: mean(x for r, x in values.items() if base_of[r] == b) for b in numbers}
                estimate += times * mean(values.values())
            bases = {b: bases.get(b, 0.0) + times * x for b, x in own.items()}
        else:
            found[claim["name"]] = interval(estimate, list(bases.values()), tail, is_bound)
    return found


def interval(estimate: float, bases: list[float], tail: float, is_bound: bool):
    """(estimate, low, high, reading), by a t-interval over bases."""
    half = student.isf(tail, len(bases) - 1) * deviation(bases) / math.sqrt(len(bases))
    low, high = estimate - half, estimate + half
    return estimate, low, high, reading(low, math.inf if is_bound else high)


def reading(low: float, high: float) -> str:
    if low > 1:
        return "helps"
    if high < -1:
        return "hurts"
    if low >= -1 and high <= 1:
        return "no difference that matters"
    if low > 0:
        return "helps, size open"
    return "hurts, size open" if high < 0 else "open"


if __name__ == "__main__":
    book = Path(__file__).parents[1] / "book"
    arguments = [Path(x) for x in sys.argv[1:]] or [book / "claims.yaml", book / "results"]
    for name, (estimate, low, high, said) in verdicts(*arguments).items():
        print(f"{name}: {estimate:+.2f} ({low:.2f} to {high:.2f}), {said}")
