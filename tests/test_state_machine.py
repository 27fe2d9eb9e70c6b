"""Whatever happens to a run, in whatever order: it is where it should be, with the right weights.

The model of a run is the list of its saves, as (task, step); the program must agree with it.
"""

import os
import signal
import tempfile
import warnings

import pandas as pd
import pytest
from forked import STEPS, TASKS, small_config, small_corpus
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cmp import evaluation, models
from cmp.errors import Interrupted
from cmp.runs import checkpoints, identity
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer, execute

pytestmark = pytest.mark.long

TOTAL = TASKS * STEPS
CONFIG = small_config("model.name=tiny-half", "model.start=random")


class Killed(BaseException):
    """Not an `Exception`, as a kill is none."""


@pytest.fixture(scope="module", autouse=True)
def table():
    """Before all: the digests of one run's weights after 0, 1, ... `TOTAL` steps, its metrics."""
    digests = [models.weights_digest(models.load_model(CONFIG.model, 0))]
    observer = Observer(
        lambda task, step, result, model: digests.append(models.weights_digest(model))
    )
    metrics = execute(CONFIG, small_corpus(), observer).metrics
    assert len(set(digests)) == TOTAL + 1
    Life.digests, Life.metrics = digests, metrics
    Life.model = models.create_model(CONFIG.model.name)
    Life.run_id = identity.run_id_of(CONFIG, small_corpus())


def count(position):
    """Steps done at a save."""
    return position[0] * STEPS + position[1]


def following(position):
    """The save after this one; a task's last step is saved with the evaluation after it."""
    task, step = position
    return (task, step + 1) if step + 1 < STEPS else (task + 1, 0)


class Life(RuleBasedStateMachine):
    """A run that is killed, stopped, damaged, looked at and finished.

    kept: the saves that lie in the folder and are whole, at most two; damaged: how many lie there
    and are not.
    """

    def __init__(self):
        super().__init__()
        self.patch, self.place = pytest.MonkeyPatch(), tempfile.TemporaryDirectory()
        self.patch.setenv("CMP_BUILD", self.place.name)
        self.folder = checkpoints.run_folder(self.run_id)
        self.kept, self.damaged = [], 0

    def teardown(self):
        self.patch.undo()
        self.place.cleanup()

    def done(self):
        return count(self.kept[-1]) if self.kept else 0

    def saved(self, position):
        self.kept, self.damaged = [*self.kept, position][-2:], 0

    def sit(self, after_step=lambda done: None):
        """Go on from the last checkpoint; `after_step` gets the number of steps done."""
        observer = Observer(lambda task, step, *_: after_step(count((task, step + 1))))
        with CheckpointManager(self.run_id, interval=0.0) as manager, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage, which `latest` below counts
            return execute(CONFIG, small_corpus(), observer, manager=manager)

    def break_off(self, steps, how, error):
        """Go on for `steps` steps, or as many as are left; `how` happens in the last of them."""
        last = min(self.done() + steps, TOTAL)
        with pytest.raises(error) as raised:
            self.sit(lambda done: how() if done == last else None)
        if not self.kept:
            self.saved((0, 0))
        if self.kept[-1][1] == STEPS:  # stopped at a task's end: now its evaluation is saved
            self.saved(following(self.kept[-1]))
        while self.done() < last - 1:
            self.saved(following(self.kept[-1]))
        return raised.value

    @precondition(lambda self: self.done() < TOTAL)
    @rule(steps=st.integers(1, 6))
    def is_killed(self, steps):
        def kill():
            raise Killed

        self.break_off(steps, kill, Killed)

    @precondition(lambda self: self.done() < TOTAL)
    @rule(steps=st.integers(1, 6), number=st.sampled_from([signal.SIGINT, signal.SIGTERM]))
    def is_stopped(self, steps, number):
        stop = self.break_off(steps, lambda: os.kill(os.getpid(), number), Interrupted)
        assert stop.signal == number
        task, step = self.kept[-1]
        self.saved((task, step + 1))

    @rule()
    def finishes(self):
        result = self.sit()
        assert models.weights_digest(result.model) == self.digests[TOTAL]
        assert result.metrics.equals(self.metrics)
        CheckpointManager(self.run_id).remove()
        self.kept, self.damaged = [], 0

    @precondition(lambda self: self.kept)
    @rule()
    def is_evaluated(self):
        path, state = self.latest()
        checkpoints.restore(state.tensors, self.model, None)
        scores = evaluation.evaluate(self.model, CONFIG.model.name, small_corpus(), subset=1)
        if state.progress.step == 0:
            kept = pd.DataFrame(state.progress.metrics)
            last = kept[(kept["task"] == state.progress.task) & (kept["scope"] == "subset")]
            assert scores.datasets["score"].tolist() == last["score"].tolist()
        assert models.weights_digest(self.model) == self.digests[self.done()]
        assert self.latest()[0] == path

    @precondition(lambda self: self.kept)
    @rule(place=st.floats(0, 1, exclude_max=True))
    def is_damaged(self, place):
        path, _ = self.latest()
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1
        path.write_bytes(content)
        self.kept.pop()
        self.damaged += 1

    def latest(self):
        """The last whole checkpoint; each that is damaged has been warned of."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            checkpoint = checkpoints.latest_checkpoint(self.folder)
        assert len(warned) == self.damaged
        return checkpoint

    @invariant()
    def is_where_it_should_be(self):
        checkpoint = self.latest()
        assert (checkpoint is None) == (not self.kept)
        if checkpoint is None:
            return
        _, state = checkpoint
        task, step = state.progress.task, state.progress.step
        assert (task, step) == self.kept[-1]
        checkpoints.restore(state.tensors, self.model, None)
        assert models.weights_digest(self.model) == self.digests[self.done()]
        rows = self.metrics[self.metrics["task"] <= task].to_dict("records")
        assert state.progress.metrics == rows


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=6,
    stateful_step_count=8,
    derandomize=True,
    phases=[Phase.generate],  # eight rules are read as they are, and shrinking takes minutes
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
