"""A rank whose forward passes sleep is named, with its node, once."""

from __future__ import annotations

import logging
import socket
import time

from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

SLOW_RANK = 1
# A forward pass of the toy model takes some milliseconds, and ranks share cores.
SLEEP_S = 0.1


def _slow_run(rank: int, num_steps: int) -> tuple[list[tuple[int, float]], list[str]]:
    """What is reported after every second step, and the warnings."""
    config = toy_config()
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import train_step
    from bitdance_scale.train import straggler

    straggler.WINDOW_STEPS = 4
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    straggler.logger.addHandler(handler)
    if rank == SLOW_RANK:
        engine.stages[0].register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
    watch, found = straggler.StragglerWatch(topology), []
    batch = step_inputs(config, topology, 2, 0)
    with watch.listening():
        for step in range(1, num_steps + 1):
            train_step(engine, batch, config.loss, 1e-3, topology)
            watch.add(1.0)
            if step % 2 == 0:
                slowest = watch.report(step)
                found.append((slowest.rank, slowest.excess))
    return found, messages


def test_a_rank_that_sleeps_in_its_forward_pass_is_named_once():
    (found, messages), (found_elsewhere, silent) = run_ranks(2, _slow_run, 8)
    assert found == found_elsewhere and not silent
    assert [rank for rank, _ in found] == [SLOW_RANK] * 4
    assert all(excess > 1 for _, excess in found)
    (message,) = messages
    assert f"rank {SLOW_RANK} (node {socket.gethostname()}) is slow" in message and message.startswith("step 4:")
