"""Image-text data, from tars to packs: index, plan, pack, read, decode.

    shards.py    data.shards, data.sources      -> paths of tars
    index.py     paths                          -> Index: where every sample lies, its size and its caption
    plan.py      (seed, index, config, step)    -> PlannedBatch: the ordered samples of one global batch
    packing.py   lengths of a global batch      -> packs of every data-parallel rank
    reader.py    (shard, offset, length)        -> bytes
    decode.py    bytes                          -> pixels of the planned bucket
    loader.py    drives the above ahead of training, in threads

Nothing random depends on a rank or a thread: the plan is a pure function, and a rank reads the part of it that is its
own.
"""
