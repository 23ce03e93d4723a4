"""Image-text data, from tars to packs.

Three rooms, each of which uses only those above it, and the files that put them together:

    storage/           data.shards, data.sources    -> paths of tars, and ranges of their bytes
    index/             paths                        -> Index: where every sample lies, its size, captions and scores
    plan/              (seed, index, config, step)  -> PlannedBatch, and its packs on every data-parallel rank

    captions.py        members of a sample          -> its captions
    image_decode.py    bytes of an image            -> pixels of the planned bucket
    checksums.py       bytes                        -> whether they are those that were recorded
    data_errors.py     what can be wrong with a sample, and how often it was
    reader.py          (index, sample)              -> bytes of its image
    bit_shards.py      (sample, resolution)         -> vision tokens encoded ahead of training, instead of images
    sample_builder.py  PlannedBatch                 -> samples with tokenised captions
    prefetch.py        a thread that works ahead of training
    loader_state.py    where a loader stands, for a resume
    loader.py          Loader: drives all of the above and yields packs
    crop_stream.py     CropStream: random crops without captions, for the visual tokenizer

Nothing random depends on a rank or a thread: the plan is a pure function, and every rank reads its own part of it.
"""
