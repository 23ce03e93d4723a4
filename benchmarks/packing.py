"""How evenly a global batch is divided, and how much of the packs is padding, by stage and number of replicas.

    python benchmarks/packing.py [--before CHECKOUT] [--plot docs/images/packing.png]

The batches are those of Table 4 (arXiv 2602.14041) with the configured buckets. Aspect ratios are log-normal with a
median wider than high, as of photographs; captions have a log-normal length with a median of 45 tokens. Costs are
those of the 14B backbone (`packing.CostModel`). With fixed packs (`data.pack_multiple = data.max_pack_tokens`) every
pack is padded to the cap, which the search of `bitdance pack-length` chooses on other batches than the measured ones.
In the baseline, next-fit, each replica packs its share of the batch alone, in the order of the plan, with a new pack
where the next sample does not fit. With `--before`, the partition of another version is measured beside it, from the
root of a checkout of that version (`git worktree add CHECKOUT COMMIT`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from packs import machine, module_before

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.apportion import Apportionment
from bitdance_scale.data.plan.buckets import assign_buckets, resolution_buckets
from bitdance_scale.data.plan.pack_length import pack_lengths
from bitdance_scale.data.plan.packing import CostModel, partition_batch
from bitdance_scale.data.plan.synthetic_packs import placeholder_tokens
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


Ranks = list[list[list[int]]]
Way = Callable[[RunConfig, np.ndarray, int, int, int], Ranks]
"""Divides a batch: configuration, lengths, replicas, cap and the multiple that packs are padded to."""


@dataclass(frozen=True)
class Quality:
    """Of one way to divide batches, the mean over several.

    Attributes:
        step: cost of the most expensive replica over the mean.
        pack: the same for the packs that run at the same time; of each batch the worst of them.
        waiting: cost of a step whose replicas meet after every pack, over the mean cost of a replica.
        padding: share of positions that are padding.
        packs: packs of a replica.
        plan_ms: milliseconds of processor time to divide one batch.
    """

    step: float
    pack: float
    waiting: float
    padding: float
    packs: float
    plan_ms: float


def batch_lengths(config: RunConfig, seed: int) -> np.ndarray:
    """int64 [B], positions of the samples of a global batch, in the order of the plan."""
    numbers = np.random.default_rng(seed)
    data, vision = config.data, config.vision
    labels = Apportionment([resolution.share for resolution in data.resolutions]).labels(0, data.global_batch)
    lengths, tokens = [], placeholder_tokens(config)
    for label in labels.tolist():
        buckets = resolution_buckets(data.resolutions[label])
        aspect = np.exp(numbers.normal(MEAN_LOG_ASPECT, SIGMA_LOG_ASPECT))
        height, width = int(LARGE_PX / np.sqrt(aspect)), int(LARGE_PX * np.sqrt(aspect))
        height, width = buckets[assign_buckets(np.array([height]), np.array([width]), buckets, 1.0)[0]]
        caption = int(
            np.clip(numbers.lognormal(np.log(MEDIAN_CAPTION), SIGMA_CAPTION), 1, config.text.max_caption_tokens)
        )
        grid = (int(height) // vision.downsample, int(width) // vision.downsample)
        lengths.append(num_positions(MARKUP_BEFORE + caption, MARKUP_AFTER, grid, tokens))
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


def baseline(config: RunConfig, lengths: np.ndarray, num_ranks: int, cap: int, multiple: int) -> Ranks:
    return next_fit(lengths, num_ranks, cap)


def ours(config: RunConfig, lengths: np.ndarray, num_ranks: int, cap: int, multiple: int) -> Ranks:
    return partition_batch(lengths, num_ranks, cap, CostModel.of_model(config.model), 1, multiple)


def way_of(checkout: str) -> Way:
    """The partition of version 0.2.0 and before, which did not know of padding."""
    module = module_before(checkout, "data/plan/packing.py")

    def before(config: RunConfig, lengths: np.ndarray, num_ranks: int, cap: int, multiple: int) -> Ranks:
        return module.partition_batch(lengths, num_ranks, cap, module.CostModel.of_model(config.model))

    return before


def quality(config: RunConfig, num_ranks: int, cap: int, multiple: int, way: Way) -> Quality:
    """The quality of one way over several batches."""
    found = []
    for seed in range(NUM_BATCHES):
        lengths = batch_lengths(config, seed)
        begun = time.process_time()
        ranks = way(config, lengths, num_ranks, cap // multiple * multiple, multiple)
        elapsed = time.process_time() - begun
        costs = CostModel.of_model(config.model).costs(lengths)
        by_pack = np.array([[costs[pack].sum() for pack in packs] for packs in ranks])
        mean = by_pack.sum(axis=1).mean()
        padded = [-(-max(1, int(lengths[pack].sum())) // multiple) * multiple for packs in ranks for pack in packs]
        found.append(
            (
                by_pack.sum(axis=1).max() / mean,
                (by_pack.max(axis=0) / by_pack.mean(axis=0)).max(),
                by_pack.max(axis=0).sum() / mean,
                1 - lengths.sum() / sum(padded),
                len(ranks[0]),
                1e3 * elapsed,
            )
        )
    return Quality(*np.mean(found, axis=0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("variable", "fixed"), help="one of the tables; default: both")
    parser.add_argument("--before", metavar="CHECKOUT", help="another version to compare with")
    parser.add_argument("--plot", help="draws what waiting for the slowest replica costs to this picture")
    options = parser.parse_args()
    print(machine())
    ways = {"next-fit": baseline} | ({"before": way_of(options.before)} if options.before else {}) | {"ours": ours}
    if options.what != "fixed":
        curves = variable_packs(ways)
        if options.plot:
            plot(curves, options.plot)
    if options.what != "variable":
        fixed_packs(ways)


def cells(found: dict[str, Quality]) -> str:
    """The numbers of a row, those of all ways in one cell."""
    formats = {"step": "{:.4f}", "pack": "{:.4f}", "waiting": "{:.4f}", "padding": "{:.2%}", "plan_ms": "{:.0f}"}
    return " | ".join(
        " / ".join(text.format(getattr(of_way, name)) for of_way in found.values()) for name, text in formats.items()
    )


def header(columns: str, ways: dict[str, Way]) -> None:
    """Prints the head of a table."""
    print(f"\nEvery cell: {' / '.join(ways)}\n\n| {columns} | step | pack | waiting | padding | plan, ms |")
    print("|---" * (columns.count("|") + 6) + "|")


def variable_packs(ways: dict[str, Way]) -> dict[str, list[dict[str, Quality]]]:
    """Prints the table of packs of variable length; stage -> the qualities for every number of replicas."""
    header("stage | replicas | packs each", ways)
    curves: dict[str, list[dict[str, Quality]]] = {}
    for stage, name in STAGES.items():
        config = load_config(name)
        cap, multiple = config.data.max_pack_tokens, config.data.pack_multiple
        for replicas in REPLICAS:
            found = {key: quality(config, replicas, cap, multiple, way) for key, way in ways.items()}
            curves.setdefault(stage, []).append(found)
            packs = f"{found['ours'].packs:.3g} of {cap:,}"
            print(f"| {stage}, {config.data.global_batch} | {replicas} | {packs} | {cells(found)} |", flush=True)
    return curves


def fixed_packs(ways: dict[str, Way]) -> None:
    """Prints the table of packs of one length, chosen on other batches."""
    header("stage, 128 replicas | longest | packs each", ways)
    for stage, name in STAGES.items():
        config = load_config(name)
        batches = [batch_lengths(config, seed) for seed in range(NUM_BATCHES, NUM_BATCHES + 4)]
        for longest in LONGEST:
            choices = pack_lengths(config, batches, [], 128, longest, config.data.pack_multiple)
            length = min(choices, key=lambda choice: choice.padding_fixed).max_pack_tokens
            found = {key: quality(config, 128, length, length, way) for key, way in ways.items()}
            packs = f"{found['ours'].packs:.3g} of {length:,}"
            print(f"| {stage} | {longest:,} | {packs} | {cells(found)} |", flush=True)


def plot(curves: dict[str, list[dict[str, Quality]]], out: str) -> None:
    """What waiting for the slowest replica costs, for a step and for every pack, by stage."""
    styles = {"next-fit": ("o-", "#b0b0b0"), "before": ("s-", "#d08a3c"), "ours": ("o-", "#3567b0")}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False)
    for column, (stage, points) in enumerate(curves.items()):
        for row, name in enumerate(("step", "waiting")):
            for way in points[0]:
                style, color = styles[way]
                values = [getattr(found[way], name) for found in points]
                axes[row, column].plot(REPLICAS, values, style, color=color, label=way)
            axes[row, column].grid(alpha=0.3)
        axes[0, column].set(title=stage)
        axes[1, column].set(xlabel="data-parallel replicas", xticks=REPLICAS)
    axes[0, 0].set_ylabel("meeting after the step")
    axes[1, 0].set_ylabel("meeting after every pack")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
