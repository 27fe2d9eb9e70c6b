"""The verdicts once more, by another hand: from the YAML file and the Parquet files alone.

Nothing of the package is imported. `python tests/independent.py` prints the verdicts of the book.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import pandas as pd
import yaml
from scipy.interpolate import pchip_interpolate
from scipy.stats import t as student

EVAL, ADAPT = "eval", "adapt"
GAINS = ("gain", "gain from the start")
HALVES = {
    "names": ["new-emoji-living", "new-emoji-signs", "new-emoji-things", "new-flags", "new-icons"],
    "looks": ["new-animals", "new-counts", "new-digits", "new-solids", "new-sprites"],
}


class Study:
    """The scores of a published study, by setting and replicate."""

    def __init__(self, path: Path):
        columns = ["setting", "replicate", "task", "scope", "role", "dataset", "score", "config"]
        table = pd.read_parquet(path, columns=columns)
        self.last = table.groupby(["setting", "replicate"])["task"].max().to_dict()
        self.means = (
            table.groupby(["setting", "replicate", "task", "scope", "role"])["score"]
            .mean()
            .to_dict()
        )
        for half, datasets in HALVES.items():
            part = table[table["dataset"].isin(datasets)]
            scores = part.groupby(["setting", "replicate", "task", "scope"])["score"].mean()
            self.means |= {(*key, half): score for key, score in scores.items()}
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


def read_studies(results: Path) -> dict[str, Study]:
    return {path.stem: Study(path) for path in sorted(results.glob("*.parquet"))}


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


def front_points(points: list[tuple[float, float]], top: int) -> tuple[list, list]:
    """The front's knots: what is up to `top`, the first that has the highest accumulation but for a
    point, made to rise and to fall.

    `points` are (A_KA, A_ZS) by rising peak."""
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
    return list(x), list(y)


def hits_disagree(path: Path) -> list[str]:
    """Where a classification score is not the share of the images that were answered right."""
    table = pd.read_parquet(path)
    rows = table[(table["metric"] == "top-1") & (table["scope"] == "full")].dropna(subset="hits")
    if not len(rows):
        return ["no hits"]
    right = rows["hits"].map(lambda bits: int.from_bytes(bits, "big").bit_count())
    wrong = (100 * right / rows["images"] - rows["score"]).abs() > 1e-9
    return [f"{r.setting}, {r.replicate}, {r.task}: {r.dataset}" for r in rows[wrong].itertuples()]


class OutsideError(Exception):
    """The front says nothing of a setting."""


def gains(own: Study, setting: str, front: Study, spec: dict, scope: str, since: bool):
    """The distance of a setting's mean scores from the front, and its values per base; of scores
    as they are, or of their changes since the start."""
    replicates = own.replicates(setting)
    base_of = {r: own.base(setting, r) for r in replicates}
    names = sorted(spec["settings"], key=front.peak)

    def centre(study: Study, name: str, kept: list[int]) -> tuple[float, float]:
        gained = mean(study.end(name, r, ADAPT) for r in kept)
        retained = mean(study.end(name, r, EVAL, scope) for r in kept)
        if since:
            gained -= mean(study.means[name, r, 0, "full", ADAPT] for r in kept)
            retained -= mean(study.means[name, r, 0, "full", EVAL] for r in kept)
        return gained, retained

    points = [centre(front, name, replicates) for name in names]
    highest = max(a for a, _ in points)
    top = next(i for i, (a, _) in enumerate(points) if a >= highest - 1)
    x, y = front_points(points, top)
    gained, retained = centre(own, setting, replicates)
    is_bound = gained > x[-1]
    if gained < x[0]:
        raise OutsideError
    if spec.get("local", False) and is_bound and top == len(points) - 1:
        raise OutsideError  # a higher peak may gain more
    whole = retained - float(pchip_interpolate(x, y, min(gained, x[-1])))
    overshoot, slope, parts, beyond_of = gained - x[-1], 0.0, {}, {}
    if is_bound:
        slope = float(pchip_interpolate(x, y, x[-1], der=1))
    for base in sorted(set(base_of.values())):
        kept = [r for r in replicates if base_of[r] != base]
        x, y = front_points([centre(front, name, kept) for name in names], top)
        gained, retained = centre(own, setting, kept)
        if max(x[0] - gained, 0.0 if is_bound else gained - x[-1]) > 0.5:
            raise OutsideError
        place = x[-1] if is_bound else min(max(gained, x[0]), x[-1])
        on_front = float(pchip_interpolate(x, y, place))
        if not is_bound:  # along the tangent
            on_front += float(pchip_interpolate(x, y, place, der=1)) * (gained - place)
        parts[base], beyond_of[base] = retained - on_front, gained - x[-1]
    own_values, over = pseudo(whole, parts), pseudo(overshoot, beyond_of)
    error = deviation(over.values()) / math.sqrt(len(over))
    if is_bound and overshoot < 4 * error:  # that it is beyond may be noise
        own_values = {b: v - slope * (over[b] - overshoot) for b, v in own_values.items()}
    return whole, own_values, is_bound


def pseudo(whole: float, parts: dict[int, float]) -> dict[int, float]:
    """The jackknife's pseudo-values."""
    return {b: len(parts) * whole - (len(parts) - 1) * x for b, x in parts.items()}


NOTHING = (math.nan, math.nan, math.nan)


def verdicts(
    claims: Path, studies: dict[str, Study], needed: int = 20
) -> dict[str, tuple[float, float, float, str, float]]:
    """Return (estimate, low, high, reading, p) of every claim that has so many replicates."""
    tree = yaml.safe_load(claims.read_text())
    all_fronts = tree.get("fronts", {})
    if "fronts_of" in tree:
        other = yaml.safe_load(claims.with_name(tree["fronts_of"] + ".yaml").read_text())
        all_fronts = other["fronts"] | all_fronts
    tail, judged = 0.05 / 2 / 12, {}
    for claim in tree["claims"]:
        fronts = [all_fronts.get(x.get("front", "plain")) for x in claim["terms"]]
        used = [(x.get("study", claim["study"]), s) for x in claim["terms"] for s in settings_of(x)]
        if claim["measure"] in GAINS:
            used += [(each["study"], s) for each in fronts for s in each["settings"]]
        counts = [len(studies[n].replicates(s)) if n in studies else 0 for n, s in used]
        if min(counts) < needed:
            judged[claim["name"]] = (*NOTHING, "not computed yet", math.nan)
            continue
        try:
            judged[claim["name"]] = verdict(claim, fronts, studies, tail)
        except OutsideError:
            judged[claim["name"]] = (*NOTHING, "outside the front", math.nan)
    return judged


def settings_of(term: dict) -> list[str]:
    return term["of"] if isinstance(term["of"], list) else [term["of"]]


def verdict(claim: dict, fronts: list[dict | None], studies: dict[str, Study], tail: float):
    measure, names = claim["measure"], claim.get("names", "all")
    scope = "full" if names == "all" else names
    estimate, bases, ends = 0.0, {}, set()
    for term, spec in zip(claim["terms"], fronts, strict=True):
        settings, times = settings_of(term), term.get("times", 1.0)
        study = studies[term.get("study", claim["study"])]
        replicates = study.replicates(settings[0])
        base_of = {r: study.base(settings[0], r) for r in replicates}
        numbers = sorted(set(base_of.values()))
        if measure in GAINS:
            front, since = studies[spec["study"]], measure != "gain"
            whole, own, beyond = gains(study, settings[0], front, spec, scope, since)
            ends.add(math.copysign(beyond, times))
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
                if measure in HALVES:
                    values[r] = study.end(settings[0], r, measure)
                    continue
                scores = [
                    study.way(s, r) if term.get("at") == "way" else study.end(s, r, ADAPT)
                    for s in settings
                ]
                values[r] = deviation(scores) if measure == "spread" else scores[0]
            own = {b: mean(x for r, x in values.items() if base_of[r] == b) for b in numbers}
            estimate += times * mean(values.values())
        bases = {b: bases.get(b, 0.0) + times * x for b, x in own.items()}
    if {1.0, -1.0} <= ends:  # a lower bound less another says nothing
        raise OutsideError
    return interval(estimate, list(bases.values()), tail, sum(ends))


def interval(estimate: float, bases: list[float], tail: float, end: float):
    """(estimate, low, high, reading, p), by a t-interval over bases; with no upper end where `end`
    is 1, and no lower one where it is -1."""
    error = deviation(bases) / math.sqrt(len(bases))
    half = student.isf(tail, len(bases) - 1) * error
    low, high = estimate - half, estimate + half
    read = reading(-math.inf if end < 0 else low, math.inf if end > 0 else high)
    p = 2 * student.sf(abs(estimate) / error, len(bases) - 1) if end * estimate >= 0 else 1.0
    return estimate, low, high, read, p


def holm(values: dict[str, float], count: int) -> dict[str, float]:
    """p-values by Holm: the smallest times `count`, the next times one less, and so on; none below
    that of a smaller one."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda pair: pair[1])):
        highest = max(highest, min(1.0, (count - rank) * p))
        adjusted[name] = highest
    return adjusted


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


DEFAULTS = json.loads(Path(__file__).with_name("golden.json").read_text())["defaults"]
"""The value of each key in a config that does not set it; older tables lack later keys."""


def row_of(tree: dict) -> str:
    """What a peak was tuned for: all of a config but its peak, seeds and scoring. Runs on the pool
    alone take the peaks of their counterparts in the stream."""
    kept = {key: value for key, value in tree.items() if key not in ("seeds", "evaluation")}
    kept["schedule"] = {key: x for key, x in tree["schedule"].items() if key != "peak"}
    if tree["mixture"]["pretraining"] == 1:
        third = {"pretraining": 1 / 3, "update": 1 / 3, "buffer": 1 / 3}
        kept["mixture"] = tree["mixture"] | third | {"replay": 0.5, "select": "concepts"}
        kept["training"] = tree["training"] | {"batch": 64}
    said = {
        key: {k: x for k, x in part.items() if x != DEFAULTS.get(f"{key}.{k}")}
        if isinstance(part, dict)
        else part
        for key, part in kept.items()
    }
    return json.dumps(said, sort_keys=True)


def tuned_peaks(studies: dict[str, Study]) -> dict[str, dict[float, list[float]]]:
    """The geometric means on the validation split of each row, by peak."""
    found: dict[str, dict[float, list[float]]] = {}
    for study in studies.values():
        for (setting, replicate), tree in study.trees.items():
            if tree["evaluation"]["split"] == "validation":
                ends = [study.end(setting, replicate, role) for role in (ADAPT, EVAL)]
                peaks = found.setdefault(row_of(tree), {})
                peaks.setdefault(tree["schedule"]["peak"], []).append(math.sqrt(math.prod(ends)))
    return found


def faults_of_tuning(claims: Path, studies: dict[str, Study], needed: int = 2) -> dict[str, str]:
    """What is wrong with the tuned peak of each setting that claims rest on, or ""."""
    tuned, found = tuned_peaks(studies), {}
    for claim in yaml.safe_load(claims.read_text())["claims"]:
        for term in claim["terms"]:
            name = term.get("study", claim["study"])
            for setting in settings_of(term):
                if name not in studies or not studies[name].replicates(setting):
                    found[f"{name}: {setting}"] = "not published"
                    continue
                tree = next(x for (own, _), x in studies[name].trees.items() if own == setting)
                peaks = tuned.get(row_of(tree), {})
                found[f"{name}: {setting}"] = fault_of_peak(tree["schedule"]["peak"], peaks, needed)
    return found


def fault_of_peak(chosen: float, tried: dict[float, list[float]], needed: int) -> str:
    """What is wrong with a peak beside the scores of those that were tried, or "". A peak between
    the best one and a neighbour of it counts as the best one."""
    grid = sorted(tried)
    if not grid:
        return f"{chosen:g} was not tried, and no other peak was"
    words = ", ".join(map("{:g}".format, grid))
    near = [x for x in grid if abs(math.log(x / chosen)) < 0.1]  # 0.00063 stands for 0.0006
    if near:
        place = grid.index(near[0])
    else:
        place = max(range(len(grid)), key=lambda n: statistics.mean(tried[grid[n]]))
        around = grid[max(place - 1, 0) : place + 2]
        if not around[0] < chosen < around[-1]:
            return f"{chosen:g} is not beside the best of {words}"
    if place in (0, len(grid) - 1):
        return f"{grid[place]:g} is at the edge of {words}"
    few = [x for x in grid[place - 1 : place + 2] if len(tried[x]) < needed]
    return f"fewer than {needed} replicates at {few[0]:g}" if few else ""


if __name__ == "__main__":
    book = Path(__file__).parents[1] / "book"
    later = sorted(book.glob("claims-*.yaml"))
    published = read_studies(book / "results")
    if sys.argv[1:] == ["--edges"]:
        faults = {}
        for claims in later:
            faults |= faults_of_tuning(claims, published)
        print("\n".join(f"{name}: {fault or 'inside its grid'}" for name, fault in faults.items()))
        sys.exit(any(faults.values()))
    for claims in map(Path, sys.argv[1:] or (book / "claims.yaml", *later)):
        for name, (estimate, low, high, said, p) in verdicts(claims, published).items():
            print(f"{name}: {estimate:+.2f} ({low:.2f} to {high:.2f}), {said}, p = {p:.4f}")
