"""Stores: what they import, and that they can be sent to another process."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.data.storage.stores import Stores


def test_local_shards_do_not_import_boto3() -> None:
    code = "import sys, bitdance_scale.data.reader; sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_copy_by_pickle_reads_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"0123456789")
    stores = Stores(S3Section(anonymous=True), max_open_files=3)
    assert stores.read(str(path), 2, 3) == b"234"
    copy = pickle.loads(pickle.dumps(stores))
    assert copy.read(str(path), 8, 100) == b"89"
    assert copy.__reduce__() == stores.__reduce__() == (Stores, (S3Section(anonymous=True), 3))
