"""Checks every node of a job before it trains and names the bad ones; the launcher starts one process per node.

    srun ... python -m cluster.preflight FOLDER --nodes NODE ... --head ADDRESS --port PORT --gpus N --procs P [limits]

Each node writes a report to FOLDER, which all nodes share: its GPUs and their memory, whether it can compile kernels if
the job's configuration does, its clock at a common moment, the bandwidth of an all-reduce over its own processes and of
one with each neighbour. Nodes are measured alone and in pairs, never all at once: if a collective over all nodes hangs,
it does not say which node is at fault. The first node reads the reports, writes `verdict.txt`, and all exit with 1 if a
node is bad. Without GPUs the all-reduce runs over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from bitdance_scale.atomic_files import write_text
from cluster.kernel_compiler import compiler_fault, compiles_on_cuda
from cluster.verdict import Finding, Gpu, Limits, Report, judge, pairings

GIB = 2**30
POLL_S = 0.2
VERDICT = "verdict.txt"
BAD_NODES = "bad_nodes"
_GOOD = "good"
# Of every phase. Python takes minutes to start from a shared file system on hundreds of nodes at once.
TIMEOUT_S = 300.0


class Preflight:
    """The pre-flight of one node. It rewrites its report before every phase, so that a hang leaves the phase's name.

    Args:
        options: the command line.
        node_index: index of this node in `options.nodes`.
    """

    def __init__(self, options: argparse.Namespace, node_index: int) -> None:
        self._options, self._index = options, node_index
        self._store: TCPStore | None = None
        self.report = Report(options.nodes[node_index])

    def run(self) -> Report:
        """Runs all phases; a failure goes into the report and the next phase begins."""
        options, nodes = self._options, self._options.nodes
        with self._phase("look at the GPUs", "CUDA works"):
            self._update(gpus=_gpus())
        if options.config and self.report.gpus and compiles_on_cuda(options.config[0], options.config[1:]):
            with self._phase("build a library in C", "it ends"):
                self._update(compiler_fault=compiler_fault())
        with self._phase("read the common clock", "every node reaches the first one's port"):
            self._update(clock_s=self._common_clock())
        if options.procs > 1:
            with self._phase("all-reduce over its own GPUs", "it works"):
                gbs = self._all_reduce("127.0.0.1", options.port + 1, 0, 1)
                self._update(local_gbs=gbs)
        for number, pairs in enumerate(pairings(len(nodes))):
            for pair in pairs:
                if self._index in pair:
                    self._measure_pair(pair, options.port + 2 + number)
        self._update(phase="done")
        return self.report

    def tell_verdict(self, is_good: bool) -> None:
        """Lets the other nodes end, as the first one; srun ends a step soon after its first task ends."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set("verdict", _GOOD if is_good else "bad")

    def wait_for_verdict(self) -> bool:
        """Whether all nodes are good, as the first one says; true where it cannot be asked, as it decides alone."""
        if self._store is None:
            return True
        # The first node may have ended already.
        with contextlib.suppress(RuntimeError):
            self._store.wait(["verdict"], datetime.timedelta(seconds=3 * TIMEOUT_S))
            return self._store.get("verdict").decode() == _GOOD
        return True

    def _measure_pair(self, pair: tuple[int, int], port: int) -> None:
        partner = self._options.nodes[pair[1] if self._index == pair[0] else pair[0]]
        gbs = None
        # No error of this node: the verdict decides which of the two failed.
        with contextlib.suppress(RuntimeError):
            self._update(phase=f"all-reduce with {partner}")
            head = self._connected_store().get(f"address/{pair[0]}").decode()
            gbs = self._all_reduce(head, port, pair.index(self._index), 2)
        self._update(pairs=(*self.report.pairs, (partner, gbs)))

    def _update(self, **fields: Any) -> None:
        self.report = dataclasses.replace(self.report, **fields)
        write_text(self._options.folder / f"{self.report.node}.json", self.report.to_json())

    @contextlib.contextmanager
    def _phase(self, phase: str, rule: str) -> Iterator[None]:
        self._update(phase=phase)
        try:
            yield
        except RuntimeError as error:
            print(f"{phase}: {error}", file=sys.stderr, flush=True)
            # The report has the first line, the node's log the rest.
            self._update(errors=(*self.report.errors, (rule, f"{phase}: {str(error).splitlines()[0]}")))

    def _common_clock(self) -> float:
        """This node's clock at the first node's signal, which comes once all nodes are there, or after a while."""
        options, is_head = self._options, self._index == 0
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        # It lives until the verdict.
        self._store = TCPStore(options.head, options.port, is_master=is_head, timeout=timeout, wait_for_workers=False)
        self._store.set(f"address/{self._index}", options.head if is_head else _own_address(options.head, options.port))
        if self._store.check(["now"]):
            raise RuntimeError(f"started {TIMEOUT_S / 2:g} s after the first node")
        self._store.add("arrived", 1)
        if is_head:
            deadline_s = time.monotonic() + TIMEOUT_S / 2
            # A node that comes later is left out: it would read its clock at another moment.
            while self._store.add("arrived", 0) < len(options.nodes) and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
            self._store.set("now", "")
        self._store.wait(["now"])
        return time.time()

    def _connected_store(self) -> TCPStore:
        if self._store is None:
            raise RuntimeError("the first node was not reached")
        return self._store

    def _all_reduce(self, head: str, port: int, node: int, num_nodes: int) -> float:
        """Bus bandwidth in GB/s of an all-reduce over the processes of `num_nodes` nodes; `node` is this node's index.

        Raises:
            RuntimeError: a process failed, the first one left no bandwidth, or the all-reduce took too long.
        """
        procs = self._options.procs
        result = self._options.folder / f"{self.report.node}.gbs"
        processes = []
        for local_rank in range(procs):
            variables = {
                "RANK": str(node * procs + local_rank),
                "WORLD_SIZE": str(num_nodes * procs),
                "LOCAL_RANK": str(local_rank),
                "MASTER_ADDR": head,
                "MASTER_PORT": str(port),
                "PROBE_TIMEOUT_S": str(TIMEOUT_S / 2),
                "PROBE_RESULT": str(result),
                "OMP_NUM_THREADS": "1",
            }
            # Its standard output is the node's log: NCCL says its version there, and more with NCCL_DEBUG=INFO.
            processes.append(subprocess.Popen([sys.executable, "-m", "cluster.probe"], env=os.environ | variables))
        deadline_s = time.monotonic() + TIMEOUT_S
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() not in (None, 0) for process in processes):
                    break
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"not finished after {TIMEOUT_S:g} s")
                time.sleep(POLL_S)
            failed = [str(rank) for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
            if failed:
                raise RuntimeError(f"process {', '.join(failed)} of the node failed")
            return _read_bandwidth(result)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            # The next all-reduce must not find it.
            result.unlink(missing_ok=True)


def wait_for_reports(folder: Path, nodes: Sequence[str], timeout_s: float) -> dict[str, Report | None]:
    """The reports of all nodes, as soon as all are done or the time is up; None for a node without one."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        reports = {node: _read(folder / f"{node}.json") for node in nodes}
        is_done = all(report is not None and report.phase == "done" for report in reports.values())
        if is_done or time.monotonic() > deadline_s:
            return reports
        time.sleep(POLL_S)


def bad_nodes(findings: Sequence[Finding], num_nodes: int) -> list[str]:
    """The nodes to exclude; none if more than half are bad, because then other nodes would be no better."""
    bad = list(dict.fromkeys(finding.node for finding in findings))
    return bad if 2 * len(bad) <= num_nodes else []


def verdict_text(reports: dict[str, Report | None], findings: Sequence[Finding], leave_out: str) -> str:
    """The result for the job's log: the bad nodes by name, or what was measured if all are good.

    Args:
        reports: of all nodes.
        findings: what is wrong with them.
        leave_out: how to start the job without the nodes whose names follow.
    """
    if findings:
        bad = ",".join(dict.fromkeys(finding.node for finding in findings))
        lines = [*map(str, findings), f"training not started; to leave the bad nodes out: {leave_out}{bad}"]
        return "".join(f"pre-flight: {line}\n" for line in lines)
    seen = [report for report in reports.values() if report is not None]
    gpus = {f"{len(report.gpus)} x {report.gpus[0].name}" if report.gpus else "no GPUs" for report in seen}
    parts = [f"{len(seen)} nodes are good ({', '.join(sorted(gpus))})"]
    local = [report.local_gbs for report in seen if report.local_gbs is not None]
    pairs = [gbs for report in seen for _, gbs in report.pairs if gbs is not None]
    for name, values in (("within a node", local), ("between nodes", pairs)):
        parts += [f"all-reduce {name} {min(values):.3g} to {max(values):.3g} GB/s"] if values else []
    clocks = [report.clock_s for report in seen if report.clock_s is not None]
    parts += [f"clocks within {max(clocks) - min(clocks):.2f} s"] if len(clocks) > 1 else []
    return f"pre-flight: {'; '.join(parts)}\n"


def _read(path: Path) -> Report | None:
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _read_bandwidth(path: Path) -> float:
    """What the first process of a probe has left, in GB/s.

    Raises:
        RuntimeError: it has left nothing, or no number.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise RuntimeError(f"process 0 of the node ended without writing its bandwidth to {path}") from None
    try:
        return float(text)
    except ValueError:
        raise RuntimeError(f"process 0 of the node wrote {text!r} as its bandwidth to {path}, no number") from None


def _own_address(other: str, port: int) -> str:
    """The address of this machine in the network of `other`; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(other, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _gpus() -> tuple[Gpu, ...]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        # This process has nothing there yet, except a CUDA context of some hundred MiB.
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total / GIB, (total - free) / GIB))
    return tuple(gpus)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs this node's part; returns 1 if any node is bad."""
    limits = {field.name: field for field in dataclasses.fields(Limits) if field.name != "num_gpus"}
    parser = argparse.ArgumentParser(description="Checks the nodes of a job before it trains.")
    parser.add_argument("folder", type=Path, help="folder of the reports, on the shared file system")
    parser.add_argument("--nodes", nargs="+", required=True, help="names of all nodes, in the order of their ranks")
    parser.add_argument("--head", required=True, help="address of the first node")
    parser.add_argument("--port", type=int, required=True, help="first of five free ports, the same on every node")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs per node of the job")
    parser.add_argument("--procs", type=int, required=True, help="processes per node of an all-reduce")
    parser.add_argument(
        "--config", nargs="+", help="configuration of the job and its settings; without, compilers are not looked for"
    )
    parser.add_argument("--node-rank", type=int, help="number of this node, from 0 [as Slurm says]")
    parser.add_argument(
        "--leave-out", default="sbatch --exclude=", help="how to start the job without the nodes whose names follow"
    )
    for name, field in limits.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=field.default, help=f"[{field.default}]")
    options = parser.parse_args(arguments)
    index = int(os.environ["SLURM_NODEID"]) if options.node_rank is None else options.node_rank
    options.folder.mkdir(parents=True, exist_ok=True)
    preflight = Preflight(options, index)
    preflight.run()
    if index > 0:
        return 0 if preflight.wait_for_verdict() else 1
    # Another node may need all of its time limits where this one did not.
    reports = wait_for_reports(options.folder, options.nodes, 2 * TIMEOUT_S)
    findings = judge(reports, Limits(options.gpus, **{name: getattr(options, name) for name in limits}))
    text = verdict_text(reports, findings, options.leave_out)
    write_text(options.folder / VERDICT, text)
    write_text(options.folder / BAD_NODES, ",".join(bad_nodes(findings, len(options.nodes))))
    preflight.tell_verdict(is_good=not findings)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
