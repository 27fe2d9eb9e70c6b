"""Published studies with made-up hits: settings that end where a test wants them to."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

import cmp
from cmp.data import load_data
from cmp.evaluation import ROLES, list_questions
from cmp.files import listed_file
from cmp.runs import identity
from lab.evidence import results, studies

REGIME = {"stream.tasks": 20, "mixture.replay": 0.5, "mixture.select": "concepts"}


def write_study(name: str, settings: dict[str, dict], **more: object) -> None:
    """Write the file of a study of twenty replicates."""
    tree = {"question": "Why?", "replicates": 20, "live": [], "common": REGIME}
    studies.STUDIES.mkdir(exist_ok=True)
    (studies.STUDIES / f"{name}.yaml").write_text(json.dumps(tree | {"settings": settings} | more))


def publish(
    name: str,
    ends: dict[str, tuple[float, ...]],
    seed: int = 0,
    start: tuple[float, float] | None = None,
) -> Path:
    """Publish a study whose settings end, on average, at given scores.

    Args:
        name: The study, whose file is written.
        ends: (A_KA, A_ZS) of each setting, and A_ZS on the names that replay lacks if it differs.
        seed: Of the noise: a share of it is that of the base, a share that of the replicate, both
            the same in every setting, and the rest is of single questions.
        start: (A_KA, A_ZS) before the stream; without it, only its end is published.
    """
    corpus = load_data("embedded")
    questions = list_questions(corpus)
    is_new = (questions["role"] == ROLES["A_KA"]).to_numpy()
    easiness = np.random.default_rng(7).normal(0, 0.25, len(questions))
    rows = []
    for (setting, replicate), run_config in studies.load_study(name).configs("cpu").items():
        base, own = run_config.seeds.init, np.random.default_rng([seed, replicate])
        shared = np.random.default_rng([seed, 99, base]).normal(0, 0.02) + own.normal(0, 0.01)
        groups = results.name_groups(corpus, run_config.seeds.data)
        draws = np.random.default_rng([seed, replicate, list(ends).index(setting)])
        luck = 0.7 * own.random(len(questions)) + 0.3 * draws.random(len(questions))
        luck = np.argsort(np.argsort(luck)) / len(luck)  # uniform again
        about = {"numerics": cmp.NUMERICS, "threads": 1, "seconds": 1.0}
        place = {"study": name, "setting": setting, "replicate": replicate}
        columns = {
            "setting": setting, "replicate": replicate, "run": identity.json_digest(place),
            "weights": "0", "config": json.dumps(run_config.to_dict()),
            "provenance": json.dumps(about),
        }  # fmt: skip
        for task, scores in ((0, start), (run_config.stream.tasks, ends[setting])):
            if scores is None:
                continue
            accumulation, retention, *lacking = scores
            without = np.where(groups["lacking"], [*lacking, retention][0], retention)
            chance = np.where(is_new, accumulation, without) / 100
            hits = luck < np.clip(chance + shared + easiness * 0.2, 0, 1)
            for dataset, part in questions.groupby("dataset"):
                own_hits, weight = hits[part.index], part["weight"].to_numpy()
                packed = np.packbits(own_hits).tobytes()
                role, score = part["role"].iloc[0], 100 * float(weight @ own_hits)
                row = columns | {"task": task, "dataset": dataset, "role": role}
                rows.append(row | {"scope": "full", "score": score, "hits": packed})
                for scope, chosen in groups.items():
                    if role == ROLES["A_ZS"]:
                        asked = weight * chosen[part.index]
                        score = 100 * float(asked @ own_hits / asked.sum())
                        rows.append(row | {"scope": scope, "score": score})
    path = results.results_file(name)
    path.parent.mkdir(exist_ok=True)
    with listed_file(path) as partial:
        pd.DataFrame(rows).to_parquet(partial, index=False)
    return path


def place(patch, folder: Path) -> None:
    """Let studies and results lie in a folder."""
    patch.setattr(studies, "STUDIES", folder / "studies")
    patch.setattr(results, "RESULTS", folder / "results")


PEAKS = (1e-4, 1.6e-4, 2.5e-4, 4e-4, 6.3e-4, 1e-3, 1.6e-3)
FRONT = {f"plain, peak {x}": {"schedule.name": "wsd", "schedule.peak": x} for x in PEAKS}
ENDS = dict(
    zip(
        FRONT,
        [(30, 52), (36, 51.5), (42, 51), (46, 50), (49, 48.5), (51, 46), (50, 42)],
        strict=True,
    )
)
"""Where a front of seven peaks ends."""
