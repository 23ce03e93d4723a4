"""From what people have, folders and tables of pictures, to shards in img2dataset's layout.

    source.py           PictureSource: pictures in a fixed order, with captions and columns
    captions.py         the bytes of a caption file -> text, or what is wrong with it
    columns.py          columns of a table -> fields of a record
    picture_folder.py   a folder with `.txt` files beside the pictures
    metadata_folder.py  a folder with metadata.jsonl, .csv or .parquet
    class_tar.py        a tar with a tar per class, read in place
    classes.py          a folder or tar per class -> labels, in a mixed order
    parquet.py          Parquet files that hold the bytes of pictures; the only file that imports pyarrow
    open_source.py      a path -> the source that it is
    picture_check.py    the bytes of a picture -> what is written, or why it is skipped
    tar_writer.py       samples -> a tar that depends on nothing else
    output_folder.py    what has been written, and by which settings
    pack.py             puts these together, in threads

The pictures are cut into shards by their places in the source, before any is read. A shard therefore does not depend on
the others: threads write them side by side, a run that was stopped writes those that are missing, and the result is the
same byte for byte.
"""
