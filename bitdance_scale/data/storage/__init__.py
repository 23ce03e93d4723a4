"""Where shards lie, and how their bytes are read.

    shards.py          data.shards, data.sources   -> paths of tars
    streams.py         data.shards that cannot be indexed: commands, http
    stores.py          path, offset, length        -> bytes, of a local file or an S3 object
    open_files.py      local files that stay open, and reads in them that are repeated
    s3.py              the S3 side of it
    s3_client.py       requests to S3, their retries, listings; for s3.py and s3_files.py
    s3_files.py        whole files to and from S3, for checkpoints
    block_cache.py     what s3.py has read, kept on the disk of the node
    store_contract.py  what files and objects have in common: the state of a shard, the error of a read
    faults.py          files that are missing, and files that cannot be read now

`stores.py` imports `s3.py`, and with it boto3, only when an object is read.
"""
