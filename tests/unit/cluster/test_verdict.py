"""Which node the pre-flight calls bad, and how it says so."""

from __future__ import annotations

import pytest

from cluster.verdict import Gpu, Limits, Report, judge, pairings

H100 = Gpu("H100", 79.6, 0.5)
LIMITS = Limits(num_gpus=8)


def node(name: str, **fields: object) -> Report:
    """A report of a good node, except for `fields`."""
    good = {
        "phase": "done",
        "gpus": (H100,) * 8,
        "clock_s": 1000.0,
        "local_gbs": 400.0,
        "pairs": (("left", 200.0), ("right", 195.0)),
    }
    return Report(name, **good | fields)


def findings(*reports: Report | None, limits: Limits = LIMITS) -> list[str]:
    """What is found about nodes n0, n1, ..., as text."""
    return [str(finding) for finding in judge({f"n{i}": report for i, report in enumerate(reports)}, limits)]


def test_good_nodes_are_good():
    assert findings(*(node(f"n{i}") for i in range(4))) == []


@pytest.mark.parametrize(
    ("fields", "found", "rule"),
    [
        ({"gpus": (H100,) * 7}, "CUDA sees 7 GPUs", "rule: 8, as the job asks for"),
        ({"gpus": (H100,) * 7 + (Gpu("H100", 39.6, 0.5),)}, "GPU 7 (H100) has 39.6 GiB", "the largest has 79.6 GiB"),
        (
            {"gpus": (Gpu("H100", 79.6, 31.0),) + (H100,) * 7},
            "GPU 0 has 31.0 GiB in use",
            "at most 2 GiB (--max-used-gib)",
        ),
        ({"clock_s": 1060.0}, "its clock is +60.0 s from the median", "at most 2 s (--max-skew-s)"),
        ({"clock_s": 997.0}, "its clock is -3.0 s", "at most 2 s"),
        ({"local_gbs": 90.0}, "all-reduce over its own GPUs: 90 GB/s", "at least 240 GB/s; the median is 400"),
        ({"pairs": (("n0", 20.0), ("n2", None))}, "with n0 20 GB/s, with n2 failed", "at least 117 GB/s"),
        (
            {"phase": "all-reduce with n2"},
            "it did not get past this phase: all-reduce with n2",
            "finishes the pre-flight in time",
        ),
        (
            {"compiler_fault": "neither gcc nor clang is installed, and CC is not set"},
            "kernels cannot be compiled: neither gcc nor clang is installed",
            "install gcc and the headers of this Python",
        ),
        ({"errors": (("CUDA works", "look at the GPUs: no driver"),)}, "look at the GPUs: no driver", "CUDA works"),
    ],
)
def test_bad_node_is_named_with_value_rule_and_fix(fields, found, rule):
    (text,) = findings(node("n0"), node("n1", **fields), node("n2"), node("n3"))
    assert text.startswith("n1: ") and found in text and rule in text and "; fix: " in text


def test_node_without_a_report_is_named():
    (text,) = findings(node("n0"), None, node("n2"))
    assert text.startswith("n1: it wrote no report") and "shared" in text


def test_node_that_hung_at_the_start_has_one_finding():
    hung = Report("n1", phase="look at the GPUs")
    (text,) = findings(node("n0"), hung, node("n2"))
    assert text.startswith("n1: it did not get past this phase: look at the GPUs")


def test_partner_of_a_slow_node_is_cleared_by_its_other_pair():
    slow = node("n1", pairs=(("n0", 20.0), ("n2", 21.0)))
    left = node("n0", pairs=(("n1", 20.0), ("n3", 200.0)))
    right = node("n2", pairs=(("n3", 200.0), ("n1", 21.0)))
    other = node("n3", pairs=(("n2", 200.0), ("n0", 200.0)))
    (text,) = findings(left, slow, right, other)
    assert text.startswith("n1: ")


def test_of_two_nodes_either_may_be_at_fault():
    one, two = (node(name, pairs=((other, None),)) for name, other in (("n0", "n1"), ("n1", "n0")))
    texts = findings(one, two)
    assert len(texts) == 2 and all("the other node may be at fault instead" in text for text in texts)


def test_clock_of_the_first_node_can_be_the_wrong_one():
    (text,) = findings(node("n0", clock_s=1100.0), node("n1"), node("n2"))
    assert text.startswith("n0: its clock is +100.0 s")


def test_absolute_limits_hold_for_a_single_node():
    (text,) = findings(node("n0", pairs=()), limits=Limits(num_gpus=8, min_local_gbs=450.0))
    assert "400 GB/s" in text and "at least 450 GB/s" in text


def test_without_gpus_nodes_are_compared_with_each_other():
    bare = {"gpus": (), "local_gbs": 0.4}
    assert findings(*(node(f"n{i}", **bare) for i in range(3)), limits=Limits(num_gpus=0)) == []
    (text,) = findings(node("n0"), node("n1", gpus=()), node("n2"), limits=Limits(num_gpus=0))
    assert text.startswith("n1: CUDA sees 0 GPUs; rule: 8, as on most nodes")


@pytest.mark.parametrize("num_nodes", range(2, 10))
def test_every_node_is_measured_with_its_two_neighbours(num_nodes):
    rounds = pairings(num_nodes)
    assert len(rounds) <= 3
    for pairs in rounds:
        members = [index for pair in pairs for index in pair]
        assert len(members) == len(set(members)), "a node cannot be in two pairs at once"
    partners = {index: set() for index in range(num_nodes)}
    for pairs in rounds:
        for one, two in pairs:
            partners[one].add(two)
            partners[two].add(one)
    for index, met in partners.items():
        assert met == {(index - 1) % num_nodes, (index + 1) % num_nodes} - {index}


def test_one_node_has_no_pairs():
    assert pairings(1) == []


@pytest.mark.parametrize("report", [Report("n0"), node("n1"), node("n2", gpus=(), errors=(("a", "b"),))])
def test_report_survives_its_file(report):
    assert Report.from_json(report.to_json()) == report
