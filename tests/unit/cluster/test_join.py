"""Nodes that come together without their launcher's help."""

from __future__ import annotations

import argparse
import threading
import time

import pytest

from cluster.join import distinct, join, main
from tests.unit.cluster.test_preflight import free_port


def node(rank: int, nodes: int, port: int, *, name: str = "machine", timeout: float = 30.0) -> argparse.Namespace:
    # Only the first node knows the number of the start.
    start = 4 if rank == 0 else 0
    return argparse.Namespace(
        nodes=nodes, rank=rank, name=name, head="127.0.0.1", port=port, start=start, timeout=timeout
    )


def test_all_learn_the_start_and_the_names_in_whatever_order_they_come():
    port, found = free_port(), {}

    def come(rank: int) -> None:
        found[rank] = join(node(rank, 3, port, name="twin" if rank else "head"))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
        # The third node looks for the first one before that is there.
        time.sleep(0.3)
    for thread in threads:
        thread.join(timeout=60)
    assert found == dict.fromkeys(range(3), (4, ["head", "twin-1", "twin-2"]))


def test_a_node_leaves_the_start_and_the_names_in_a_file(tmp_path, capsys):
    options = {"nodes": 1, "rank": 0, "name": "n0", "head": "127.0.0.1", "port": free_port(), "start": 4, "timeout": 30}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main([str(tmp_path / "joined"), *arguments]) == 0
    assert (tmp_path / "joined").read_text() == "4\nn0\n" and capsys.readouterr().out == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_does_not_come_is_not_waited_for_for_ever(rank):
    with pytest.raises(RuntimeError):
        join(node(rank, 2, free_port(), timeout=1.5))


def test_names_are_kept_where_they_differ():
    assert distinct(["a", "b", "a"]) == ["a-0", "b", "a-2"]
