"""What the pre-flight says of a node's compiler."""

from __future__ import annotations

import shutil
import sysconfig

import pytest

from cluster.kernel_compiler import compiler_fault


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a program the compiler."""

    def use(script: str) -> str:
        path = tmp_path / "cc"
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o700)
        monkeypatch.setenv("CC", str(path))
        return str(path)

    return use


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("clang") is None, reason="needs a C compiler")
def test_a_compiler_that_works(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    assert compiler_fault() is None


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_fault() == "neither gcc nor clang is installed, and CC is not set"


def test_a_compiler_that_fails(compiler):
    path = compiler("echo version.c: in a file; echo 'version.c:1:10: fatal error: no headers'; exit 4")
    assert compiler_fault() == f"{path} ends with 4: version.c:1:10: fatal error: no headers"
    path = compiler("exit 3")
    assert compiler_fault() == f"{path} ends with 3: "


def test_a_compiler_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert compiler_fault().startswith(f"{tmp_path}/none cannot be run: ")


def test_python_without_headers(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert compiler_fault() == f"{tmp_path}/Python.h does not exist"
