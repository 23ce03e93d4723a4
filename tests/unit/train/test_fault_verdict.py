"""What is said of a bad step, from signs written out by hand."""

from __future__ import annotations

import math

from bitdance_scale.train.fault_verdict import (
    GRADIENT,
    INPUT,
    LOSS,
    MicroFault,
    MicroReading,
    RankReport,
    Sign,
    explain_non_finite,
    explain_spike,
)

NAN = math.nan


def report(
    rank: int, *readings: MicroReading, stages: tuple[int, ...] = (0,), replica: int | None = None, num_micro: int = 4
) -> RankReport:
    num_differing = sum(any(sign.differs for sign in reading.signs) for reading in readings)
    replica = rank if replica is None else replica
    num_broken = sum(reading.is_broken for reading in readings)
    return RankReport(rank, f"node{rank}", replica, 0, stages, num_micro, num_broken, num_differing, readings)


def micro(number: int, *signs: Sign, loss: float | None = None) -> MicroReading:
    return MicroReading(number, (10 * number, 10 * number + 1), signs, loss)


def places(faults: list[MicroFault]) -> list[tuple[str, int, int]]:
    return [(fault.cause, fault.rank, fault.micro_batch) for fault in faults]


def test_the_same_again_speaks_for_the_data() -> None:
    (fault,) = explain_non_finite([report(0), report(1, micro(2, Sign(LOSS, 0, NAN, NAN)))])
    assert places([fault]) == [("data", 1, 2)]
    assert fault.node == "node1" and fault.keys == (20, 21)
    assert fault.evidence == "the loss is not finite, and is so again: its samples or the weights"


def test_a_number_that_is_finite_again_speaks_for_the_machine() -> None:
    (fault,) = explain_non_finite([report(0, micro(1, Sign(LOSS, 0, NAN, 3.5), Sign(GRADIENT, 0, NAN))), report(1)])
    assert places([fault]) == [("machine", 0, 1)]
    assert fault.evidence == "the loss was nan and is 3.5 when computed again"


def test_another_finite_number_speaks_for_the_machine_too_and_comes_first() -> None:
    reports = [report(0, micro(0, Sign(LOSS, 0, NAN, NAN))), report(1, micro(3, Sign(LOSS, 0, 3.5, 3.25)))]
    assert places(explain_non_finite(reports)) == [("machine", 1, 3), ("data", 0, 0)]


def test_where_forward_passes_do_not_repeat_to_the_bit_nobody_is_blamed_for_it() -> None:
    noisy = [micro(number, Sign(LOSS, 0, 3.5, 3.5000001)) for number in (1, 2, 3)]
    reports = [report(0, micro(0, Sign(LOSS, 0, NAN, NAN)), *noisy), report(1, *noisy)]
    assert places(explain_non_finite(reports)) == [("data", 0, 0)]
    flipped = [report(0, micro(0, Sign(LOSS, 0, NAN, 1.0)), *noisy), report(1, *noisy)]
    assert places(explain_non_finite(flipped)) == [("machine", 0, 0)]


def test_a_number_is_followed_to_the_stage_where_it_goes_wrong() -> None:
    first = report(0, micro(1, Sign(INPUT, 0, 2.0, 2.0), Sign(GRADIENT, 0, NAN)), stages=(0,), replica=0)
    second = report(1, micro(1, Sign(INPUT, 1, NAN, 4.0), Sign(GRADIENT, 1, NAN)), stages=(1,), replica=0)
    last = report(2, micro(1, Sign(INPUT, 2, NAN, 4.0), Sign(LOSS, 2, NAN, 1.0)), stages=(2,), replica=0)
    (fault,) = explain_non_finite([first, second, last])
    assert places([fault]) == [("machine", 0, 1)], "what enters stage 1 was made by stage 0"
    assert "the hidden state was nan and is 4 when" in fault.evidence
    sound = report(1, micro(1, Sign(INPUT, 1, 3.0, 3.0), Sign(GRADIENT, 1, NAN)), stages=(1,), replica=0)
    assert places(explain_non_finite([first, sound, last])) == [("machine", 1, 1)]


def test_a_gradient_alone_goes_wrong_on_the_last_stage_that_has_it() -> None:
    first = report(0, micro(1, Sign(INPUT, 0, 2.0, 2.0), Sign(GRADIENT, 0, NAN)), stages=(0,), replica=0)
    second = report(1, micro(1, Sign(INPUT, 1, 2.0, 2.0), Sign(GRADIENT, 1, math.inf)), stages=(1,), replica=0)
    assert places(explain_non_finite([first, second])) == [("backward", 1, 1)]


def test_all_micro_batches_at_once_are_the_weights_and_name_no_sample() -> None:
    reports = [report(rank, *(micro(n, Sign(LOSS, 0, NAN, NAN)) for n in range(4))) for rank in range(2)]
    (fault,) = explain_non_finite(reports)
    assert fault.cause == "weights" and fault.keys == () and "as in all 8 micro-batches" in fault.evidence


def test_sound_micro_batches_leave_their_sum() -> None:
    (fault,) = explain_non_finite([report(0), report(1)])
    assert fault.cause == "sum" and fault.rank == -1


def test_a_spike_names_the_highest_losses_or_gradients() -> None:
    reports = [
        report(0, micro(0, Sign(GRADIENT, 0, 0.5), loss=1.0), micro(1, Sign(GRADIENT, 0, 0.1), loss=9.0)),
        report(1, micro(0, Sign(GRADIENT, 0, 0.7), loss=3.0), micro(1, Sign(GRADIENT, 0, 0.2), loss=2.0)),
    ]
    assert places(explain_spike(reports, "loss", 2)) == [("spike", 0, 1), ("spike", 1, 0)]
    assert places(explain_spike(reports, "grad_norm", 2)) == [("spike", 1, 0), ("spike", 0, 0)]
    unwatched = [report(0, micro(0, loss=1.0)), report(1, micro(0, loss=2.0))]
    (fault, _) = explain_spike(unwatched, "grad_norm", 2)
    assert fault.rank == 1 and fault.evidence == "own loss 2"
