from __future__ import annotations

from pathlib import Path

from bitdance_scale.observe.faults import FAULTS_FILE, Fault, append_faults, describe_faults
from bitdance_scale.observe.metrics import read_records


def fault(number: int, num_samples: int = 6) -> Fault:
    samples = tuple({"key": key, "name": f"00{key}", "shard": "a.tar"} for key in range(num_samples))
    return Fault(7, "non_finite", "data", 3, "node", 1, number, "the loss is not finite", samples)


def test_lines_are_added_and_read_back(tmp_path: Path) -> None:
    append_faults(tmp_path, [fault(0), fault(1)])
    append_faults(tmp_path, [fault(2)])
    assert read_records(tmp_path / FAULTS_FILE, Fault) == [fault(0), fault(1), fault(2)]


def test_the_line_of_the_log_is_bounded() -> None:
    line = describe_faults([fault(number, 1000) for number in range(50)])
    assert line.startswith(
        "rank 3 (node node), micro-batch 0: the loss is not finite; samples 000 of a.tar, 001 of a.tar, 002 of a.tar, "
        "003 of a.tar and 996 more. rank 3"
    )
    assert line.endswith("47 more micro-batches are in faults.jsonl") and len(line) < 600


def test_what_has_no_rank_is_told_without_one() -> None:
    assert describe_faults([Fault(7, "non_finite", "sum", -1, "", -1, -1, "the sum is not finite")]) == (
        "the sum is not finite"
    )
