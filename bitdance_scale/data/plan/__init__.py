"""Which samples make up which global batch, and which packs it becomes.

    buckets.py          size of an image                 -> the bucket at which each resolution trains it
    filters.py          sizes and scores of a source     -> the samples that pass the filters
    selection.py        index, buckets, filters          -> the samples of every source at every resolution, stored once
    apportion.py        shares                           -> whose turn it is, exact at every prefix
    permutation.py      key                              -> an order that takes no memory, and random draws
    plan.py             (seed, index, config, step)      -> PlannedBatch: the samples of a global batch, from the above
    packing.py          lengths of a global batch        -> the packs of every data-parallel rank
    synthetic_packs.py  config                           -> packs like those of a run, without data
    small_set.py        index, config                    -> what a small data set lacks, in words
    pack_length.py      lengths of many batches          -> the values of data.max_pack_tokens that waste least

`plan.py` uses the five files above it. `packing.py` knows nothing of the plan: it sees only lengths.
"""
