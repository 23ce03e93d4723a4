"""What a kind of machine can do: constants with their sources, one TOML file per kind of GPU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.config.load import load_config
from bitdance_scale.errors import ConfigError

MACHINES = Path(__file__).parent / "machines"
"""Folder of the machines that come with the package."""
_MAY_BE_ZERO = ("reserved_gib", "overlap_fraction", "message_s", "kernel_gap_s", "kernel_launch_s")
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A number and where it is from.

    Attributes:
        value: in the unit that its name says.
        source: a data sheet, a measurement with its command, or the word assumed and why.
    """

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of GPU in a kind of node; bandwidths are of one GPU in one direction.

    Attributes:
        name: what tables call it.
        device: a part of the name that PyTorch gives the device; `cpu` for a processor core.
        gpus_per_node: GPUs with the fast connection between them.
        memory_gib: memory of a GPU, 2^30 bytes.
        reserved_gib: of it, what CUDA, NCCL and fragmentation take, 2^30 bytes.
        bfloat16_flops: peak of dense products in bfloat16, FLOP/s.
        float32_flops: the same in float32, FLOP/s.
        encoder_float32_flops: peak of the convolutions of the image encoder in float32, FLOP/s.
        encoder_tf32_flops: the same in TF32.
        gemm_fraction: share of the peak that large matrix products reach.
        gemm_halved_fraction: what is left of that share when twice the tensor-parallel ranks halve a width.
        attention_fraction: share that attention reaches, over pairs that see each other.
        encoder_fraction: share that the encoder reaches.
        memory_bytes_per_s: peak of reading and writing the GPU's memory, bytes/s.
        memory_fraction: share of it that elementwise kernels reach.
        node_bytes_per_s: peak between GPUs of a node, bytes/s.
        node_fraction: share of it that collectives reach.
        network_bytes_per_s: peak between nodes, bytes/s.
        network_fraction: share of it that collectives reach.
        overlap_fraction: share of a collective that is hidden behind a product it runs beside.
        message_s: fixed time of a collective or message, seconds.
        kernel_gap_s: time of the device between two kernels that were queued, seconds.
        kernel_launch_s: time of the host to queue a kernel, seconds.
    """

    name: str
    device: str
    gpus_per_node: int
    memory_gib: Constant
    reserved_gib: Constant
    bfloat16_flops: Constant
    float32_flops: Constant
    encoder_float32_flops: Constant
    encoder_tf32_flops: Constant
    gemm_fraction: Constant
    gemm_halved_fraction: Constant
    attention_fraction: Constant
    encoder_fraction: Constant
    memory_bytes_per_s: Constant
    memory_fraction: Constant
    node_bytes_per_s: Constant
    node_fraction: Constant
    network_bytes_per_s: Constant
    network_fraction: Constant
    overlap_fraction: Constant
    message_s: Constant
    kernel_gap_s: Constant
    kernel_launch_s: Constant

    @property
    def usable_bytes(self) -> int:
        """Memory that a run may fill, bytes."""
        return int((self.memory_gib.value - self.reserved_gib.value) * _GIB)

    def peak_flops(self, dtype: str) -> float:
        """Peak of dense products in `bfloat16` or `float32`, FLOP/s."""
        return (self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops).value

    def product_rate(self, dtype: str, tensor: int) -> float:
        """What products reach that so many tensor-parallel ranks divide, FLOP/s of one."""
        share = self.gemm_fraction.value * self.gemm_halved_fraction.value ** math.log2(tensor)
        return self.peak_flops(dtype) * share

    def encoder_rate(self, precision: str) -> float:
        """What the image encoder reaches, in `float32` or `tf32`, FLOP/s."""
        peak = self.encoder_tf32_flops if precision == "tf32" else self.encoder_float32_flops
        return peak.value * self.encoder_fraction.value

    @property
    def node_rate(self) -> float:
        """What collectives within a node reach, bytes/s per GPU."""
        return self.node_bytes_per_s.value * self.node_fraction.value

    @property
    def network_rate(self) -> float:
        """What messages between nodes reach, bytes/s per GPU."""
        return self.network_bytes_per_s.value * self.network_fraction.value

    @property
    def memory_rate(self) -> float:
        """What elementwise kernels reach, bytes/s."""
        return self.memory_bytes_per_s.value * self.memory_fraction.value


def shipped_machines() -> list[str]:
    """Names of the machines that come with the package."""
    return sorted(path.stem for path in MACHINES.glob("*.toml"))


def load_machine(name: str) -> Machine:
    """A machine by its name in `shipped_machines`, or by the path of its file.

    Raises:
        ConfigError: there is no such machine, or its file cannot be read, lacks a constant or has an impossible one.
    """
    path = Path(name)
    if not path.is_file():
        path = MACHINES / f"{name}.toml"
        if name not in shipped_machines():
            raise ConfigError(
                f"--gpu {name}: there is no such file, and no such machine comes with the package "
                f"({', '.join(shipped_machines())}); name one of them, or a file that `bitdance plan --calibrate` wrote"
            )
    machine = load_config(path, schema=Machine)
    if faults := list(_faults(machine)):
        raise ConfigError("\n".join([f"{path}: the machine cannot be used:", *(f"- {fault}" for fault in faults)]))
    return machine


def constants(machine: Machine) -> dict[str, Constant]:
    """Its constants by name, in their order."""
    values = {field.name: getattr(machine, field.name) for field in dataclasses.fields(machine)}
    return {name: value for name, value in values.items() if isinstance(value, Constant)}


def _faults(machine: Machine) -> list[str]:
    faults = []
    if machine.gpus_per_node < 1:
        faults.append(f"gpus_per_node = {machine.gpus_per_node}: must be at least 1")
    for name, constant in constants(machine).items():
        most = 1.0 if name.endswith("_fraction") else math.inf
        is_too_small = constant.value < 0 or (constant.value == 0 and name not in _MAY_BE_ZERO)
        # A comparison with NaN is false.
        if is_too_small or not constant.value <= most or math.isinf(constant.value):
            least = "at least 0" if name in _MAY_BE_ZERO else "above 0"
            top = " and at most 1" if most == 1.0 else ""
            faults.append(f"{name}.value = {constant.value}: must be a finite number {least}{top}")
        if not constant.source.strip():
            faults.append(f"{name}.source = '': must say where the number is from")
    if machine.reserved_gib.value >= machine.memory_gib.value:
        faults.append(
            f"reserved_gib.value = {machine.reserved_gib.value}: must be below memory_gib.value = "
            f"{machine.memory_gib.value}"
        )
    return faults
