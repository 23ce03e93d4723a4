"""The pipeline split by cost against the even one: by the cost model's estimate, and measured on a small model.

    python benchmarks/pipeline_split.py [RANKS ...]

Like the 14B model, the small one is uneven: its head weighs about five layers. Two ranks on two cores run as on two
GPUs, so their step times compare. Four ranks share the cores, so for them the processor time of each rank's main
thread counts: on four devices the slowest rank sets the pace.
"""

from __future__ import annotations

import sys

from launch import run_workload
from packs import machine

from bitdance_scale.config.load import load_config
from bitdance_scale.parallel.stage_split import even_split, stage_costs, stage_split

VOCAB_14B = 151940
VOCAB = 1000
CONFIG = "demo"
MODEL = [
    "model.hidden_size=192",
    "model.ffn_size=448",
    "model.num_heads=6",
    "model.num_kv_heads=2",
    "model.num_layers=16",
    "head.width=192",
    "head.num_blocks=6",
    "head.num_adaln=2",
    "data.max_pack_tokens=1280",
    "data.global_batch=80",
]
NUM_PACKS = 8


def _estimate(config_path: str, overrides: list[str], vocab_size: int) -> tuple[str, str, float]:
    """(even split, split by cost, slowest rank of the first over that of the second)."""
    config = load_config(config_path, overrides)
    costs, split = stage_costs(config, vocab_size), stage_split(config, vocab_size)
    even = even_split(config.model.num_layers, config.parallel.num_stages)
    ranks = config.parallel.pipeline
    return str(list(even)), str(list(split)), max(costs.of_ranks(even, ranks)) / max(costs.of_ranks(split, ranks))


def main() -> None:
    print("14B, PT mix (estimate)\n\n| pipeline | even | by cost | slowest rank, even / by cost |\n|---|---|---|---|")
    for pipeline in (2, 4, 8):
        even, split, ratio = _estimate("pt_14b", [f"parallel.pipeline={pipeline}"], VOCAB_14B)
        print(f"| {pipeline} | {even} | {split} | {ratio:.2f} |")
    print(f"\nSmall model, measured\n\n{machine()}\n")
    print("| pipeline | even | by cost | estimate | step time | slowest rank's processor time |")
    print("|---|---|---|---|---|---|")
    for pipeline in [int(argument) for argument in sys.argv[1:]] or (2, 4):
        overrides = [*MODEL, f"parallel.pipeline={pipeline}"]
        even, split, estimate = _estimate(CONFIG, overrides, VOCAB)
        results = {}
        for how in ("even", "auto"):
            arguments = [
                CONFIG,
                *overrides,
                f"parallel.pipeline_split={how}",
                "--packs",
                str(NUM_PACKS),
                "--steps",
                "2",
            ]
            results.setdefault(how, []).append(run_workload(pipeline, arguments))
        step = {how: min(run["step_s"] for run in runs) for how, runs in results.items()}
        busy = {how: min(max(run["busy_s"]) for run in runs) for how, runs in results.items()}
        print(
            f"| {pipeline} | {even} | {split} | {estimate:.2f} | {step['even'] / step['auto']:.2f} "
            f"| {busy['even'] / busy['auto']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
