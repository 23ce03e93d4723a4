"""What a data set holds: one scan of its tars, kept in columns that every process maps into memory.

    tar_scan.py    bytes of a tar          -> its members, and where the tar is broken
    shard_scan.py  members of a tar        -> samples: place, size, captions and scores
    build.py       shards, index folder    -> the index, in parallel, only what is new or has changed
    index.py       index folder            -> Index: every sample of the data set
    report.py      Index                   -> what to tell a person, and whether training may start

Training opens an index with `index.py`; the others only run when shards are new.
"""
