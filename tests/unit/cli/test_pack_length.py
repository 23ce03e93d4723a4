"""`bitdance pack-length` on a small data set."""

from __future__ import annotations

from pathlib import Path

from bitdance_scale.cli.pack_length import main
from tests.unit.data.small_data import sample_members, write_tar


def test_it_reads_captions_and_sizes(tmp_path: Path, capsys) -> None:
    for shard in range(2):
        members = {f"{shard}{n:03d}": sample_members(40 + n, 130, "a red circle " * (n % 5), n) for n in range(60)}
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    demo = ["demo", f'data.shards=["{tmp_path}"]', "data.max_upscale=4"]
    demo += ["data.global_batch=40", "data.max_pack_tokens=2304"]
    assert main([*demo, "--ranks", "4", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "4 steps of 40 samples on 4 replicas" in printed
    assert "32 px: 10% up to" in printed and "128 px: 10% up to" in printed
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    caps = [int(row[1].replace(",", "")) for row in rows]
    assert caps == sorted(caps, reverse=True) and all(cap % 32 == 0 and 200 < cap <= 2304 for cap in caps)
    assert sum("*" in row[2] for row in rows) >= 1 and sum("*" in row[3] for row in rows) >= 1
    assert main([*demo, "--ranks", "4", "--longest", "200"]) == 2
    assert "--longest 200: no number of packs holds the 40 samples" in capsys.readouterr().err
