"""A run as it will be computed: what its config leaves open is settled here, once."""

import functools
from dataclasses import dataclass
from typing import Any

from cmp import budgets, models
from cmp.config import RunConfig
from cmp.data import Corpus, load_data
from cmp.runs import identity, store
from cmp.scale import processes


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose data and starting weights are here.

    Attributes:
        config: The config as it was asked for, with the whole id of the run that it goes on from.
        fitted: The config that is computed, see `cmp.budgets.settle`.
        corpus: The data.
        identity: All that decides the result, see `cmp.runs.identity.run_identity`.
    """

    config: RunConfig
    fitted: RunConfig
    corpus: Corpus
    identity: dict[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """The run's id."""
        return identity.json_digest(self.identity)

    @property
    def steps(self) -> int:
        """Steps over all tasks."""
        return sum(self.fitted.steps)


def resolve_run(run_config: RunConfig) -> ResolvedRun:
    """Load what a run needs, and settle what its config leaves open.

    Of several processes all call this; the first downloads and decodes, and the others find what
    it kept.

    Args:
        run_config: The run's config.

    Raises:
        CmpError: The data or the starting weights cannot be had, or do not go with the config.
    """
    run_config = store.fetch_start(run_config)
    with processes.first_process_first():
        corpus = load_data(run_config.data)
        models.tokenize(run_config.model.name, tuple(corpus.texts))
    fitted = budgets.settle(run_config, corpus)
    return ResolvedRun(run_config, fitted, corpus, identity.run_identity(run_config, corpus))
