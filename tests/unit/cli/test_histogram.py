"""`bitdance histogram`: what is refused before a rank starts."""

from __future__ import annotations

import pytest

from bitdance_scale.cli.histogram import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.pdf"], "--out a.pdf: must be the name of a PNG file"),
        (["--out=a.png", "--times=0,1.5"], "argument --times: '0,1.5': must be numbers from 0 to 1"),
        (["--out=a.png", "--times=nan"], "argument --times: 'nan': must be numbers from 0 to 1"),
        (["--out=a.png", "--times=0;1"], "argument --times: '0;1': must be numbers from 0 to 1"),
        (["--out=a.png", "head.kind=bitwise", "head.diff_batch_mul=1"], "head.kind = 'bitwise' has no flow time"),
        (["--out=a.png", "evaluate.shards=[]"], "evaluate.shards = []: there are no held-out images"),
        (["--out=a.png", "--nproc=3", "parallel.pipeline=2"], "3 ranks: must be a multiple of .* = 2; start 2"),
        (["--out=a.png", "--nproc=21", "evaluate.images=20"], "evaluate.images = 20: must be at least 21 for 21 repl"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refusals(arguments, message, capfd):
    assert main(["demo", *arguments]) == 2
    found = capfd.readouterr().err
    assert _matches(message, found), found


def _matches(message: str, found: str) -> bool:
    return all(part in found for part in message.split(".*"))
