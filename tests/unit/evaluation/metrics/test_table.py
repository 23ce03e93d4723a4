from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.metrics.table import format_scores


def scores(metric, images=(), figures=None, notes=()):
    return Scores(metric, metric, "ours", {}, {}, {}, images, figures or {}, notes)


def test_values_have_intervals_and_numbers_of_prompts():
    images = tuple(
        ImageScore(f"{number}", k, "a", 1.0, {"overall": (1.0, 1.0), **({"rare": (1.0, 2.0)} if number else {})})
        for number in range(3)
        for k in range(2)
    )
    table = format_scores(scores("dpg", images, {"as published": 0.8828}, ("one", "two")))
    assert table == (
        "DPG-Bench of ours: 3 prompts, 6 images\n"
        "\n"
        "dpg            value    95 % interval  prompts\n"
        "overall       100.00  43.85 to 100.00        3\n"
        "rare           50.00   50.00 to 50.00        2\n"
        "as published   88.28\n"
        "\n"
        "note: one\n"
        "note: two"
    )


def test_a_set_has_figures_alone():
    table = format_scores(scores("distribution", (), {"FID": 2.371, "Inception Score": 215.8371, "precision": 0.8265}))
    assert table == (
        "FID, sFID, IS, precision, recall of ours\n"
        "\n"
        "distribution      value\n"
        "FID                2.37\n"
        "Inception Score  215.84\n"
        "precision        0.8265"
    )


def test_shares_have_four_digits():
    table = format_scores(scores("geneval", (ImageScore("0", 0, "colors", 1.0, {"colors": (1.0, 1.0)}),)))
    assert "colors   1.0000  0.2065 to 1.0000        1" in table
