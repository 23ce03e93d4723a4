from dataclasses import replace

import numpy as np
import pytest

from bitdance_scale.evaluation.metrics.estimate import differences, estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL, as_parts, mean_of


def images_of(values, category="a", first=0, num_images=1):
    return [
        ImageScore(f"{category}{first + index:05d}", k, category, float(value), {category: (float(value), 1.0)})
        for index, value in enumerate(values)
        for k in range(num_images)
    ]


def test_the_overall_value_is_the_mean_of_the_named_parts():
    images = images_of([1, 0, 0, 0], "a") + images_of([1, 1], "b") + images_of([0], "c")
    found = estimates(images, mean_of(("a", "b", "absent")))
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {OVERALL: 0.625, "a": 0.25, "b": 1, "c": 0}
    )
    # Wilson's interval of 2 of 2.
    assert (found["b"].low, found["b"].high) == (pytest.approx(2 / (2 + 1.96**2), abs=1e-4), 1)
    with pytest.raises(ValueError, match="no images"):
        estimates([], mean_of(("a",)))


def test_a_part_is_a_sum_over_its_weight():
    images = [
        ImageScore("0", 0, "", 0.5, {OVERALL: (1, 2), "rare": (3, 4)}),
        ImageScore("1", 0, "", 1.0, {OVERALL: (6, 6)}),
    ]
    found = estimates(images, as_parts)
    assert found[OVERALL].value == pytest.approx(7 / 8)
    assert (found["rare"].value, found["rare"].low, found["rare"].high) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize(
    ("value", "num_prompts", "low", "high"),
    # As Brown, Cai and DasGupta have Wilson's interval (2001, 10.1214/ss/1009213286).
    [(0, 10, 0.0, 0.2775), (1, 50, 0.9287, 1.0)],
)
def test_a_share_at_its_end_has_an_interval(value: int, num_prompts: int, low: float, high: float):
    # Four images of a prompt are one observation.
    found = estimates(images_of([value] * num_prompts, num_images=4), mean_of(("a",)))
    for name in (OVERALL, "a"):
        assert (found[name].low, found[name].high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_intervals_are_those_of_prompts():
    right = np.random.default_rng(5).random(100) < 0.6
    # All four images of a prompt are alike, so that there are 100 observations and not 400.
    found = estimates(images_of(right, num_images=4), mean_of(("a",)))[OVERALL]
    share = right.mean()
    # The normal approximation of a binomial; the bootstrap's quantiles of 2000 are within a hundredth of it.
    half = 1.96 * np.sqrt(share * (1 - share) / 100)
    assert (found.value, found.low, found.high) == pytest.approx((share, share - half, share + half), abs=0.015)


def test_a_difference_is_paired():
    rng = np.random.default_rng(7)
    hard = rng.random(400)
    before, after = images_of(hard), images_of(hard + 0.05 + 0.01 * rng.standard_normal(400))
    found = differences(before, after, mean_of(("a",)))[OVERALL]
    assert found.estimate.value == pytest.approx(0.05, abs=0.003)
    # Far narrower than the spread of the prompts, 1.96 * sqrt(1 / 12 / 400) = 0.028.
    assert found.estimate.high - found.estimate.low < 0.004
    assert found.is_clear
    assert found.num_better + found.num_worse == found.num_prompts == 400
    assert found.num_better == (np.array([i.value for i in after]) > hard).sum()
    reverse = differences(after, before, mean_of(("a",)))[OVERALL]
    assert (reverse.estimate.low, reverse.estimate.high) == pytest.approx((-found.estimate.high, -found.estimate.low))


def test_a_difference_is_of_the_shared_prompts():
    found = differences(images_of([1, 1, 0]), images_of([0, 1, 1], first=1), mean_of(("a",)))[OVERALL]
    assert (found.num_prompts, found.num_better, found.num_worse) == (2, 1, 1)
    assert not found.is_clear
    with pytest.raises(ValueError, match="no images"):
        differences(images_of([1]), images_of([1], first=1), mean_of(("a",)))


@pytest.mark.parametrize(("num_prompts", "is_clear"), [(4, False), (5, False), (6, True), (10, True)])
def test_few_prompts_that_all_change_alike_may_do_so_by_chance(num_prompts: int, is_clear: bool):
    # With a probability of 2 / 2^n, which is 0.125 of four prompts and 0.031 of six.
    others = images_of([0.5, 0.7] * 10, "b")
    before, after = (images_of([value] * num_prompts, num_images=4) + others for value in (0.25, 0.75))
    for sides, sign in (((before, after), 1), ((after, before), -1)):
        found = differences(*sides, mean_of(("a", "b")))
        assert vars(found["a"].estimate) == {"value": 0.5 * sign, "low": 0.5 * sign, "high": 0.5 * sign}
        # Prompts of the category alone; the overall value is of all of them, and those that are equal say nothing.
        assert (found["a"].num_better + found["a"].num_worse, found["a"].num_prompts) == (num_prompts, num_prompts)
        assert found[OVERALL].num_prompts == num_prompts + 20
        assert found["a"].is_clear == found[OVERALL].is_clear == is_clear
        assert not found["b"].is_clear


def test_a_mean_that_few_prompts_raise_is_not_clear():
    # 30 of 100 prompts are far better, and 70 a little worse.
    changes = np.array([1.0] * 30 + [-0.01] * 70)
    found = differences(images_of(np.zeros(100)), images_of(changes), mean_of(("a",)))[OVERALL]
    assert found.estimate.low > 0 and (found.num_better, found.num_worse) == (30, 70)
    assert not found.is_clear


def test_a_share_of_several_parts_has_wilsons_interval_of_their_prompts():
    images = images_of([1] * 3, "a") + images_of([1] * 2, "b") + images_of([0, 1] * 50, "c")
    found = estimates(images, mean_of(("a", "b")))[OVERALL]
    # Of the five prompts of both, none of which are of "c".
    assert (found.low, found.high) == (pytest.approx(5 / (5 + 1.96**2), abs=1e-4), 1)


def test_prompts_of_a_unit_are_resampled_as_one():
    values = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]
    apart = images_of(values, "a") + images_of(values, "b")
    together = [replace(image, unit=image.prompt_id[1:]) for image in apart]
    found, wider = (estimates(images, mean_of(("a", "b"))) for images in (apart, together))
    assert vars(wider[OVERALL]) == vars(wider["a"]) == vars(wider["b"])
    assert found[OVERALL].value == wider[OVERALL].value
    # Two halves of equal spread: sqrt(2) narrower if they were drawn apart, up to a step of the quantiles.
    assert found[OVERALL].high - found[OVERALL].low < 0.85 * (wider[OVERALL].high - wider[OVERALL].low)


def test_scores_of_an_earlier_version_are_compared_in_the_units_of_today():
    earlier = images_of([0.2, 0.4, 0.6], "a") + images_of([0.2, 0.4, 0.6], "b")
    today = [replace(image, parts={image.category: (1.0, 1.0)}, unit=image.prompt_id[1:]) for image in earlier]
    found = differences(earlier, today, mean_of(("a", "b")))[OVERALL]
    assert (found.estimate.value, found.num_better, found.num_prompts) == (pytest.approx(0.6), 3, 3)


def test_intervals_depend_on_the_seed_alone():
    images = images_of([index % 3 == 0 for index in range(97)], "a") + images_of([0, 1, 1], "b")
    first, again, other = (estimates(images, mean_of(("a", "b")), seed)[OVERALL] for seed in (0, 0, 1))
    assert first == again == estimates(images[::-1], mean_of(("a", "b")))[OVERALL]
    assert first.value == other.value and first != other
