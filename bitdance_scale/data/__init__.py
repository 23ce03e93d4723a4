"""Image-text data, from tars to packs.

Four rooms, each of which uses only those above it, and the files that put them together:

    storage/           data.shards, data.sources    -> paths of tars, and ranges of their bytes
    images/            bytes of an image            -> its header, whether it is sound, its pixels in sRGB
    index/             paths                        -> Index: where every sample lies, its size, captions and scores
    plan/              (seed, index, config, step)  -> PlannedBatch, and its packs on every data-parallel rank

    captions.py        members of a sample          -> its captions
    image_decode.py    bytes of an image            -> pixels of the planned bucket
    augment.py         (seed, epoch, sample)        -> which view of the picture: a crop, mirrored
    checksums.py       bytes                        -> whether they are those that were recorded
    data_errors.py     what can be wrong with a sample, and how often it was
    reader.py          (index, sample)              -> bytes of its image
    bit_shards.py      (sample, resolution)         -> vision tokens encoded ahead of training, instead of images
    sample_builder.py  PlannedBatch                 -> samples with tokenised captions
    prefetch.py        a thread that works ahead of training
    loader_state.py    where a loader stands, for a resume
    stream_sampling.py samples out of streams, checked, in a buffer
    stream.py          StreamLoader: the same packs of tars that cannot be indexed
    loader.py          Loader: drives all of the above and yields packs
    shard_writing/     folders, tables and Parquet files of pictures -> tars, before all this
    crop_stream.py     CropStream: random crops without captions, for the visual tokenizer

Nothing random depends on a rank or a thread: the plan is a pure function, and every rank reads its own part of it.
"""
