"""Runs started by an explorer, each in a separate process and followed through its log.

`python -m lab.live_runs` is such a process. It reads a config from standard input, and saves and
stops once the input is closed, so that it ends with the kernel that started it. It has its own
process group, so interrupting a cell does not affect it.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pandas as pd
import torch

from cmp import budgets, config
from cmp.config import RunConfig
from cmp.errors import Interrupted
from cmp.project import build_folder
from cmp.runs import identity, launch, logs, lookup, store
from lab import chapters
from lab.evidence import workers

AT_A_TIME = 2
"""Runs that a machine computes at a time. Further runs wait, whichever process computes the
others."""
POLL_SECONDS = 0.25


async def follow_run(run_config: RunConfig, stop: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
    """Compute a run in a separate process, unless it is stored, and yield its progress.

    Args:
        run_config: The run.
        stop: Set to stop the run, which saves its state.

    Yields:
        {"trail": [[A_KA, A_ZS] of each evaluation so far]} and {"words": text, "progress": share},
        with `over` once it has ended and `done` if it is stored.
    """
    await asyncio.to_thread(lookup.fetch_start, run_config)
    run_id = identity.run_id_of(run_config)
    if not store.is_stored(run_id):
        while lookup.runs_in_progress() >= AT_A_TIME and not stop.is_set():
            yield {"words": "queued: two runs are in progress", "progress": 0.0}
            await asyncio.sleep(POLL_SECONDS)
        if not stop.is_set():
            async for message in _computed(run_config, run_id, stop):
                yield message
                if message.get("over"):
                    return
    if store.is_stored(run_id):
        scores = scores_on_way(store.load_run(run_id))
        yield {"trail": scores[["A_KA", "A_ZS"]].to_numpy().round(2).tolist()}
        yield {"words": "done", "done": True, "progress": 1.0, "over": True}
    else:  # stopped by anyone
        yield {"words": "stopped; run it to continue", "over": True}


async def _computed(
    run_config: RunConfig, run_id: str, stop: asyncio.Event
) -> AsyncIterator[dict[str, Any]]:
    """Compute a run in a separate process, and yield its progress and why it failed.

    A request to stop is repeated each time, since the first may come before the process can save.
    """
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lab.live_runs"), **pipes, stderr=asyncio.subprocess.DEVNULL,
        cwd=chapters.BOOK, start_new_session=True,
        env=os.environ | {"CMP_BUILD": str(build_folder().absolute())},
    )  # fmt: skip
    try:
        yield {"words": "starting", "progress": 0.0}
        process.stdin.write(json.dumps(run_config.to_dict()).encode() + b"\n")
        total = budgets.total_steps(run_config)
        seen, ended = 0, asyncio.create_task(process.wait())
        while not ended.done():
            await asyncio.wait([ended], timeout=POLL_SECONDS)
            if stop.is_set() and not ended.done():
                yield {"words": "stopping"}
                process.terminate()
            log = logs.read_log(logs.log_path(run_id))
            if seen < len(log) and "loss" in log:
                seen, steps = len(log), int(log["loss"].count())
                yield {"words": f"step {steps} of {total}", "progress": steps / total}
                scored = log.reindex(columns=["A_KA", "A_ZS"]).dropna()
                yield {"trail": scored.to_numpy().round(2).tolist()}
        # after a request to stop, it has saved or had not begun
        if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            reason = (await process.stdout.read()).decode().strip()
            cause = reason or f"its process ended with status {process.returncode}"
            yield {"words": f"failed: {cause}", "over": True}
    finally:  # the explorer or the kernel has ended
        if process.returncode is None:
            process.stdin.close()


def scores_on_way(run: store.StoredRun) -> pd.DataFrame:
    """Return `A_KA`, `A_ZS` and `GM` of a run before its stream and after each task, indexed by
    task, on the largest test that was scored at that point."""
    table = store.trajectory(run.metrics)
    widest = table.sort_values("scope").drop_duplicates("task")  # "full" sorts before "subset"
    return widest.set_index("task").sort_index()[["A_KA", "A_ZS", "GM"]]


def main() -> None:
    """Compute the run with the config in the first line of standard input."""
    given = sys.stdin.readline()
    workers.stop_gently(sys.stdin.read)
    run_config = config.parse(json.loads(given), "explorer")
    torch.set_num_threads(1)
    workers.load_plugins()
    try:
        launch.run_one(run_config, wait=True)
    except Interrupted as stop:
        sys.exit(128 + stop.signal)
    except Exception as error:
        print(workers.failure_reason(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
