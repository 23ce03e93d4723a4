"""What a data set holds: one scan of its tars, kept in columns that every process maps into memory.

    tar_scan.py      bytes of a tar          -> its members and links, and where the tar is broken
    grouping.py      members of a tar        -> samples: image, texts and record of each key
    shard_scan.py    samples                 -> columns: place and checksum, size, captions and scores
    shard_errors.py  what a scan counts as wrong, and what to do about it
    column_file.py   columns                 -> one file, written piece by piece and mapped
    segment.py       columns of shards       -> a segment of the index
    verification.py  segments                -> which of them are not what was written
    workers.py       the processes of a scan
    build.py         shards, index folder    -> the index, in parallel, only what is new or has changed
    known_shards.py  tables in a folder      -> what they know of shards, whichever lists they are of
    index.py         index folder            -> Index: every sample of the data set
    comparison.py    Index, shards           -> what has changed since they were indexed
    report.py        Index                   -> what to tell a person, and whether training may start
    distributions.py Index                   -> histograms, as text and as a picture

Training opens an index with `index.py`; the others only run when shards are new.
"""
