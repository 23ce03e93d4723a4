"""Step time of every kind of layout against data parallelism on the same packs and the same number of processes.

    python benchmarks/layouts.py

On a CPU with fewer cores than ranks it measures the work and messages that a layout adds, not how it scales.
"""

from __future__ import annotations

from launch import run_workload
from packs import machine

CONFIG = "demo"
# Wider and longer than the demo, so that products outweigh the engines' fixed cost.
MODEL = [
    "model.hidden_size=256",
    "model.ffn_size=768",
    "model.num_heads=8",
    "model.num_kv_heads=4",
    "model.num_layers=4",
    "head.width=256",
    "data.max_pack_tokens=1280",
    "data.global_batch=40",
]
LAYOUTS: dict[int, list[str]] = {
    2: [
        "",
        "zero_stage=2",
        "zero_stage=3",
        "recompute=selective",
        "recompute=full",
        "tensor=2",
        "tensor=2 sequence_parallel=true",
        "pipeline=2",
    ],
    4: [
        "",
        "tensor=2 sequence_parallel=true",
        "pipeline=2",
        "pipeline=4",
        "tensor=2 sequence_parallel=true pipeline=2",
    ],
}


def main() -> None:
    print(f"{machine()}\n\n| ranks | layout | step s | against DP | peak memory of a rank, GB |\n|---|---|---|---|---|")
    for num_ranks, layouts in LAYOUTS.items():
        baseline = None
        for layout in layouts:
            settings = [f"parallel.{setting}" for setting in layout.split()]
            result = run_workload(num_ranks, [CONFIG, *MODEL, *settings, "--packs", "4", "--steps", "3"])
            step_s = result["step_s"]
            baseline = baseline or step_s
            gigabytes = result["memory_bytes"] / 1e9
            print(
                f"| {num_ranks} | {layout or 'DP'} | {step_s:.2f} | {step_s / baseline:.2f} | {gigabytes:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
