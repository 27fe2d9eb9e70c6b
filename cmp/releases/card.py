"""The model card of a release, in Markdown."""

from pathlib import Path

import numpy as np
import pandas as pd

from cmp import models
from cmp.config import RunConfig
from cmp.files import read_yaml
from cmp.releases.compare import Comparison
from cmp.releases.release import ReleaseRecord

CARD = read_yaml(Path(__file__).with_name("card.yaml"))["card"]
"""The card with places for values."""


def release_card(
    record: ReleaseRecord, run_config: RunConfig, comparison: Comparison | None, folder: str
) -> str:
    """Return the card of a release.

    Args:
        record: What its stream.json holds.
        run_config: The config of its last update.
        comparison: The model before the last update and after it, None where nothing is scored.
        folder: What the release's folder is called.
    """
    name, last = run_config.model.name, record.updates[-1]
    tokenizer = f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
    if name in models.family_names():  # whose networks and tokens are the package's own
        tokenizer = "import cmp.embedded.models\n\n"
        tokenizer += f'tokenizer = cmp.models.tokenizer("{name}")'
    columns = ["", "training pictures", "steps", "highest rate"]
    updates = pd.DataFrame(
        [(x.name, f"{x.images:,}", x.steps, f"{x.peak:g}") for x in record.updates],
        columns=pd.Index(columns),
    )
    sets = [
        (tree["name"], arrival["role"], tree.get("licence", "not given"))
        for arrival in record.arrivals
        for tree in arrival["sets"] or [{"name": arrival["folder"]}]
    ]
    data = pd.DataFrame(dict.fromkeys(sets), columns=pd.Index(["", "role", "licence"]))
    hidden = ("data", "training.task_steps")
    changes = [(k, str(x)) for k, x in run_config.changes().items() if k not in hidden]
    mixture = run_config.mixture
    return CARD.format(
        name=name, start=run_config.model.start, folder=folder, tokenizer=tokenizer,
        count="once" if len(record.updates) == 1 else f"{len(record.updates)} times",
        last=last.name, images=f"{last.images:,}", id=record.id,
        scores=score_table(comparison) if comparison else "No picture is held out for tests yet.",
        updates=markdown_table(updates), method=run_config.method.name,
        merging=run_config.merging.policy, batch=sum(last.counts),
        shares=", ".join(f"{share:.2f}" for share in mixture.shares), data=markdown_table(data),
        settings=markdown_table(pd.DataFrame(changes, columns=pd.Index(["", "value"]))),
        **{key: record.provenance[key] for key in ("device", "torch", "open_clip")},
    )  # fmt: skip


def score_table(comparison: Comparison) -> str:
    """Return the scores before and after an update in Markdown."""
    table = pd.concat([comparison.summary, comparison.sets])
    rows = pd.DataFrame(
        {
            "": table.index,
            "before": table["old"],
            "after": table["new"],
            "change, 95% interval": [
                f"{x.change:+.1f} ({x.low:+.1f} to {x.high:+.1f})" for x in table.itertuples()
            ],
            "lost": [
                "none was right" if np.isnan(share) else f"{share:.1f}%"
                for share in table["lost_share"]
            ],
        }
    )
    return markdown_table(rows)


def markdown_table(table: pd.DataFrame) -> str:
    """Return a table without its index in Markdown, numbers with one digit."""
    texts = table.map(lambda value: f"{value:.1f}" if isinstance(value, float) else str(value))
    rows = [[*table.columns], ["---"] * table.shape[1], *texts.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
