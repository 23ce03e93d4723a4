"""What a run says of itself before it starts."""

from __future__ import annotations

from types import SimpleNamespace

from bitdance_scale.config.load import load_config
from bitdance_scale.data.plan.plan import StreamUse
from bitdance_scale.train.run_observer import _summary, sources_summary


def test_a_14b_run_says_what_it_costs():
    config = load_config("pt_14b")
    ranks = SimpleNamespace(
        tensor_size=4, pipeline_size=1, data_size=64, world_size=256, device_name="NVIDIA H100 80GB HBM3"
    )
    text = _summary(config, ranks, 151940, resumed_step=0)
    assert "2,560 images" in text and "tensor 4 x pipeline 1 x data 64" in text
    # 1,178 vision tokens an image on the square mix (0.2 x 256 + 0.7 x 1024 + 0.1 x 4096), with caption and markup.
    tokens = int(text.split("about ")[1].split(" tokens")[0].replace(",", "")) / 2560
    assert 1178 < tokens < 1450
    # 6 FLOP per weight and token at the least: 14.77 B, without the embedding's 0.78 B and the output's on most
    # positions.
    flops = float(text.split("tokens and ")[1].split(" FLOP")[0])
    assert 6 * 13.2e9 * tokens * 2560 < flops < 1.6 * 6 * 14.8e9 * tokens * 2560
    step_s = flops / (256 * 989e12 * 0.4)
    assert f"{step_s:.1f} s a step and {step_s * 100_000 / 86_400:.1f} days at 40%" in text


def test_on_an_unknown_device_no_time_is_claimed():
    config = load_config("demo")
    ranks = SimpleNamespace(tensor_size=1, pipeline_size=1, data_size=2, world_size=2, device_name="cpu")
    text = _summary(config, ranks, 755, resumed_step=100)
    assert "steps 100 to 1150, 20 images" in text and "days" not in text


def test_sources_say_what_the_run_takes_of_them():
    uses = [
        StreamUse("open", 512, 1_000, 1_500),
        StreamUse("open", 1024, 400, 2_000),
        StreamUse("own", 512, 50, 500),
        StreamUse("own", 1024, 0, 0),
    ]
    assert sources_summary(uses).splitlines() == [
        "source open: 3,500 images in all, 87.50%; 512 px 1.5 epochs of 1,000 images, 1024 px 5 epochs of 400 images",
        (
            "source own: 500 images in all, 12.50%; 512 px 10 epochs of 50 images, 1024 px none is large enough, its "
            "share goes to the other sources"
        ),
    ]
    (line,) = sources_summary([StreamUse("", 512, 8, 2)]).splitlines()
    assert line == "data: 2 images in all, 100.00%; 512 px 0.25 epochs of 8 images"
