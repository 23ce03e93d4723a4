"""What is checked before a model is built."""

from __future__ import annotations

import shutil

import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.parallel.build import check_compiler


@pytest.mark.parametrize(("device", "names"), [("cpu", ["g++", "$CXX"]), ("cuda", ["gcc", "$CC"])])
def test_compiling_without_a_compiler_is_refused(monkeypatch, device, names):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError) as raised:
        check_compiler(torch.device(device))
    for text in ("parallel.compile = true", "parallel.compile=false", *names):
        assert text in str(raised.value)


def test_a_compiler_that_is_named_must_exist(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match="/no/such/compiler is not on this machine"):
        check_compiler(torch.device("cpu"))


def test_cuda_needs_triton(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Triton is not on this machine"):
        check_compiler(torch.device("cuda"))
    check_compiler(torch.device("cpu"))
