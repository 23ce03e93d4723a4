"""Machine files: shipped ones are whole and agree with the table of peaks; faulty ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.cost import peak_flops
from bitdance_scale.planning.machine import MACHINES, constants, load_machine, shipped_machines

GPUS = [name for name in shipped_machines() if load_machine(name).device != "cpu"]


@pytest.mark.parametrize("name", shipped_machines())
def test_every_constant_has_a_source(name):
    machine = load_machine(name)
    assert all(len(constant.source) > 10 for constant in constants(machine).values())
    assert 0 < machine.usable_bytes < machine.memory_gib.value * 2**30


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_those_of_the_utilisation(name):
    machine = load_machine(name)
    # H100 and H200 stand for several products: the files are of the SXM ones.
    for dtype in ("bfloat16", "float32"):
        assert machine.peak_flops(dtype) == peak_flops(f"NVIDIA {machine.device} SXM", dtype)


def test_an_unknown_machine_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="--gpu h100: .*h100-80"):
        load_machine("h100")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 0.65", "value = 1.61", r"gemm_fraction.value = 1.61: must be a finite number above 0 and at most 1"),
        ("value = 3.35e12", "value = 0.0", r"memory_bytes_per_s.value = 0.0: must be a finite number above 0"),
        ("value = 3.35e12", "value = nan", r"memory_bytes_per_s.value = nan"),
        ("value = 9.5", "value = 90.0", r"reserved_gib.value = 90.0: must be below memory_gib.value = 79.6"),
        ("[message_s]", "[mesage_s]", r"message_s"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, old, new, message):
    text = (MACHINES / "h100-80.toml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "own.toml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_machine(str(file))


def test_divided_products_reach_less():
    machine = load_machine("h100-80")
    whole = machine.peak_flops("bfloat16") * machine.gemm_fraction.value
    assert machine.product_rate("bfloat16", 1) == whole
    assert machine.product_rate("bfloat16", 4) == pytest.approx(whole * machine.gemm_halved_fraction.value**2)
