"""Resolve a run once: load its data, and determine everything its config leaves open."""

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
    """A run with its data loaded and its starting weights on this machine.

    Attributes:
        config: The config as given, with the full id of the run that it starts from.
        fitted: The config that is actually run, see `cmp.budgets.settle`.
        corpus: The data.
        identity: Everything that determines the result, see `cmp.runs.identity.run_identity`.
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
        """The number of steps over all tasks."""
        return sum(self.fitted.steps)


def resolve_run(run_config: RunConfig) -> ResolvedRun:
    """Load what a run needs, and determine what its config leaves open.

    With several processes, all of them call this. The first downloads and decodes, and the others
    use its cached results.

    Args:
        run_config: The run's config.

    Raises:
        CmpError: The data or starting weights are not available, or contradict the config.
    """
    run_config = store.fetch_start(run_config)
    with processes.first_process_first():
        corpus = load_data(run_config.data)
        models.tokenize(run_config.model.name, tuple(corpus.texts))
    fitted = budgets.settle(run_config, corpus)
    return ResolvedRun(run_config, fitted, corpus, identity.run_identity(run_config, corpus))
