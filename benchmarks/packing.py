"""How evenly a global batch is divided, and how much of the packs is padding, by stage and number of replicas.

    python benchmarks/packing.py [--plot docs/images/packing.png]

The batches are those of Table 4 (arXiv 2602.14041) with the configured buckets. Aspect ratios are log-normal with a
median wider than high, as of photographs; captions have a log-normal length with a median of 45 tokens. Costs are
those of the 14B backbone (`packing.CostModel`). With fixed packs (`data.pack_multiple = data.max_pack_tokens`) every
pack is padded to the cap, which the search of `bitdance pack-length` chooses on other batches than the measured ones.
In the baseline each replica packs its share of the batch alone, in the order of the plan, with a new pack where the
next sample does not fit.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from packs import machine

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.apportion import Apportionment
from bitdance_scale.data.plan.buckets import assign_buckets, resolution_buckets
from bitdance_scale.data.plan.pack_length import pack_lengths
from bitdance_scale.data.plan.packing import CostModel, partition_batch
from bitdance_scale.sequence.layout import num_positions

STAGES = {"PT": "pt_14b", "CT and SFT": "ct_14b", "distillation": "distill_14b"}
REPLICAS = (64, 128, 192, 256)
LONGEST = (8960, 21504)
NUM_BATCHES = 6
MEDIAN_CAPTION, SIGMA_CAPTION = 45, 0.6
MEAN_LOG_ASPECT, SIGMA_LOG_ASPECT = 0.15, 0.4
"""Of width over height: half of the photographs are between 0.9 and 1.5."""
LARGE_PX = 8000
MARKUP_BEFORE, MARKUP_AFTER = 10, 1


@dataclass(frozen=True)
class Quality:
    """Of one way to divide batches, the mean over several.

    Attributes:
        slowest: cost of the most expensive replica over the mean.
        padding: share of positions that are padding.
        packs: packs of a replica.
        plan_ms: milliseconds to divide one batch.
    """

    slowest: float
    padding: float
    packs: float
    plan_ms: float


def batch_lengths(config: RunConfig, seed: int) -> np.ndarray:
    """int64 [B], positions of the samples of a global batch, in the order of the plan."""
    numbers = np.random.default_rng(seed)
    data, vision = config.data, config.vision
    labels = Apportionment([resolution.share for resolution in data.resolutions]).labels(0, data.global_batch)
    lengths = []
    for label in labels.tolist():
        buckets = resolution_buckets(data.resolutions[label])
        aspect = np.exp(numbers.normal(MEAN_LOG_ASPECT, SIGMA_LOG_ASPECT))
        height, width = int(LARGE_PX / np.sqrt(aspect)), int(LARGE_PX * np.sqrt(aspect))
        height, width = buckets[assign_buckets(np.array([height]), np.array([width]), buckets, 1.0)[0]]
        caption = int(
            np.clip(numbers.lognormal(np.log(MEDIAN_CAPTION), SIGMA_CAPTION), 1, config.text.max_caption_tokens)
        )
        grid = (int(height) // vision.downsample, int(width) // vision.downsample)
        lengths.append(num_positions(MARKUP_BEFORE + caption, MARKUP_AFTER, grid, vision.block_tokens))
    return np.array(lengths, dtype=np.int64)


def next_fit(lengths: np.ndarray, num_ranks: int, cap: int) -> list[list[list[int]]]:
    """Every replica packs its share alone; all then run as many packs as the one with the most."""
    ranks = []
    for share in np.array_split(np.arange(len(lengths)), num_ranks):
        packs: list[list[int]] = [[]]
        room = cap
        for place in share.tolist():
            if lengths[place] > room:
                packs.append([])
                room = cap
            packs[-1].append(place)
            room -= int(lengths[place])
        ranks.append(packs)
    most = max(map(len, ranks))
    return [packs + [[]] * (most - len(packs)) for packs in ranks]


def quality(config: RunConfig, num_ranks: int, cap: int, multiple: int, is_baseline: bool) -> Quality:
    """The quality of one way over several batches."""
    costs_of = CostModel.of_model(config.model)
    found = []
    for seed in range(NUM_BATCHES):
        lengths = batch_lengths(config, seed)
        begun = time.process_time()
        usable = cap // multiple * multiple
        ranks = (
            next_fit(lengths, num_ranks, usable)
            if is_baseline
            else partition_batch(lengths, num_ranks, usable, costs_of)
        )
        elapsed = time.process_time() - begun
        costs = costs_of.costs(lengths)
        by_rank = [sum(costs[pack].sum() for pack in packs) for packs in ranks]
        padded = [-(-max(1, int(lengths[pack].sum())) // multiple) * multiple for packs in ranks for pack in packs]
        padding = 1 - lengths.sum() / sum(padded)
        found.append((max(by_rank) / np.mean(by_rank), padding, len(ranks[0]), 1e3 * elapsed))
    return Quality(*np.mean(found, axis=0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("variable", "fixed"), help="one of the tables; default: both")
    parser.add_argument("--plot", help="draws the slowest replica over the mean to this picture")
    options = parser.parse_args()
    print(machine())
    if options.what != "fixed":
        curves = variable_packs()
        if options.plot:
            plot(curves, options.plot)
    if options.what != "variable":
        fixed_packs()


def variable_packs() -> dict[str, list[tuple[Quality, Quality]]]:
    """Prints the table of packs of variable length; stage -> (baseline, ours) for every number of replicas."""
    columns = ("stage", "replicas", "packs each", "slowest, next-fit", "slowest, ours", "padding, next-fit")
    print(f"\n| {' | '.join((*columns, 'padding, ours', 'plan'))} |")
    print("|---|---|---|---|---|---|---|---|")
    curves: dict[str, list[tuple[Quality, Quality]]] = {}
    for stage, name in STAGES.items():
        config = load_config(name)
        cap, multiple = config.data.max_pack_tokens, config.data.pack_multiple
        for replicas in REPLICAS:
            base, ours = (quality(config, replicas, cap, multiple, is_baseline) for is_baseline in (True, False))
            curves.setdefault(stage, []).append((base, ours))
            print(
                f"| {stage}, {config.data.global_batch} | {replicas} | {ours.packs:.0f} of {cap:,} | "
                f"{base.slowest:.3f} | {ours.slowest:.4f} | {base.padding:.1%} | {ours.padding:.2%} | "
                f"{ours.plan_ms:.0f} ms |",
                flush=True,
            )
    return curves


def fixed_packs() -> None:
    """Prints the table of packs of one length, chosen on other batches."""
    print(
        "\n| stage, 128 replicas | longest | length chosen | packs each | slowest | padding, next-fit | padding, ours |"
    )
    print("|---|---|---|---|---|---|---|")
    for stage, name in STAGES.items():
        config = load_config(name)
        batches = [batch_lengths(config, seed) for seed in range(NUM_BATCHES, NUM_BATCHES + 4)]
        for longest in LONGEST:
            choices = pack_lengths(config, batches, [], 128, longest, config.data.pack_multiple)
            length = min(choices, key=lambda choice: choice.padding_fixed).max_pack_tokens
            base, ours = (quality(config, 128, length, length, is_baseline) for is_baseline in (True, False))
            print(
                f"| {stage} | {longest:,} | {length:,} | {ours.packs:.3g} | {ours.slowest:.4f} | {base.padding:.1%} | "
                f"{ours.padding:.1%} |",
                flush=True,
            )


def plot(curves: dict[str, list[tuple[Quality, Quality]]], out: str) -> None:
    """The slowest replica over the mean, by stage."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, (stage, pairs) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        axis.plot(REPLICAS, [base.slowest for base, _ in pairs], "o-", color="#b0b0b0", label="next-fit per replica")
        axis.plot(REPLICAS, [ours.slowest for _, ours in pairs], "o-", color="#3567b0", label="ours")
        axis.set(title=stage, xlabel="data-parallel replicas", xticks=REPLICAS)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("slowest replica over mean")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
