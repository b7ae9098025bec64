"""Times every peer in turns in one process, which is the only way that ratios are honest on a busy machine.

    python benchmarks/compare.py                                 # the 17 blocks and the network, batch 1
    python benchmarks/compare.py --only network --threads 2 --batch 16 --json out.json
    python benchmarks/compare.py --memory                        # activation and resident memory

Peers that are not installed are named as missing. `MBV2_MAX_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2` holds ours and the oneDNN
users (torch, OpenVINO) to AVX2; the settings go into the header.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mbv2_kernels._bench.inputs import InputError
from mbv2_kernels._bench.machine import describe, machine
from mbv2_kernels._bench.peers import FusedFp16, Peer, PeerUnavailable
from mbv2_kernels._bench.suite import (
    columns,
    compare_blocks,
    missing_lines,
    peer_table,
    peer_versions,
    record,
    table,
    write_json,
)
from mbv2_kernels._bench.timing import Comparison, activation_peak, compare
from mbv2_kernels.cli import (
    Parser,
    Progress,
    build,
    fp16_options,
    network_options,
    origin,
    output_options,
    run,
    timing_options,
    title,
)
from peers import block_peers, network_peers

MEMORY_CALLS = 5


def resident() -> int:
    """Bytes of memory that this process holds now (Linux), what the allocator could give back given back."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def measure_memory(arguments: argparse.Namespace) -> int:
    """In a process of its own: the memory of one peer, as one line of JSON."""
    model, x, _ = build(arguments)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    peer = next(peer for peer in network_peers() if peer.name == arguments.memory_of)
    found: dict[str, Any] = {}
    with torch.no_grad():
        try:
            peer_run = peer.prepare(model, x, threads)
        except PeerUnavailable as error:
            print(json.dumps({"unavailable": str(error)}))
            return 0
        del model  # peers that keep a copy of their own need it no more
        for _ in range(MEMORY_CALLS):
            peer_run()
        found["resident"] = resident()
        found["activations"] = activation_peak(peer_run)
    print(json.dumps(found))
    return 0


def memory(arguments: argparse.Namespace, argv: Sequence[str], peers: Sequence[Peer]) -> dict[str, Any]:
    """Activation peak and resident memory of every peer, each in its own process, started with the same arguments."""
    results: dict[str, Any] = {}
    progress = Progress()
    for done, peer in enumerate(peers):
        progress(f"memory of {peer.name}", done, len(peers))
        reason = peer.missing()
        if reason is None and hasattr(peer, "packages"):
            # Its process would hold torch and the export too, and its allocator tells torch nothing.
            reason = "a runtime of its own; only what runs in torch is compared"
        if reason:
            results[peer.name] = {"unavailable": reason}
            continue
        child = subprocess.run(
            [sys.executable, __file__, *argv, "--memory-of", peer.name], capture_output=True, text=True, check=False
        )
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"measuring the memory of {peer.name} failed: {last}")
        results[peer.name] = json.loads(child.stdout.strip().splitlines()[-1])
    progress.clear()
    return results


def memory_table(results: dict[str, Any]) -> str:
    """MiB of each peer and its ratio to eager."""
    eager = results.get("eager", {})

    def cells(result: dict[str, Any], key: str) -> list[str]:
        if not result.get(key):
            return ["-", "-"]
        return [f"{result[key] / 2**20:.1f}", f"{result[key] / eager[key]:.2f}" if eager.get(key) else "-"]

    rows = [["", "activations MiB", "/ eager", "resident MiB", "/ eager"]]
    for name, result in results.items():
        if "unavailable" not in result:
            rows.append([name, *cells(result, "activations"), *cells(result, "resident")])
    return columns(rows)


def compare_command(arguments: argparse.Namespace) -> int:
    """Everything that was asked for, as tables and JSON."""
    if arguments.memory_of:
        return measure_memory(arguments)
    model, x, note = build(arguments)
    threads = arguments.threads or torch.get_num_threads()
    every = network_peers(compiled=not arguments.no_compile)
    singles = block_peers()
    if arguments.fp16_accumulation:
        every, singles = ([peers[0], FusedFp16(), *peers[1:]] for peers in (every, singles))
    if arguments.peers:
        wanted = [name.strip() for name in arguments.peers.split(",")]
        known = [peer.name for peer in every]
        for name in wanted:
            if name not in known:
                raise InputError(f"--peers: no peer {name!r}, expected some of {', '.join(known)}")
        every, singles = ([p for p in peers if p.ours or p.name in wanted] for peers in (every, singles))
    header = machine(threads, x.device)
    peak = header["fma_peak_gflops_per_thread"] * threads
    versions = peer_versions(every)
    print(f"{describe(header)}\n{title(arguments, x)}\n{note}")
    print("peers: " + ", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    content: dict[str, Any] = {
        **origin(arguments, header, x, note),
        "peers": versions,
        "threads": threads,
    }
    if arguments.memory:
        argv = [*sys.argv[1:]] if arguments.argv is None else list(arguments.argv)
        content["memory"] = memory(arguments, argv, every)
        print(f"\nmemory, each peer in a process of its own, after {MEMORY_CALLS} calls:")
        print(memory_table(content["memory"]))
        for name, result in content["memory"].items():
            if "unavailable" in result:
                print(f"not measured: {name}: {result['unavailable']}")
    else:
        results: list[Comparison] = []
        progress = Progress()
        try:
            if arguments.only != "network":
                results = compare_blocks(
                    model, x, singles, threads=threads, seconds=arguments.seconds, progress=progress
                )
                progress.clear()
                content["blocks"] = [record(c, singles, peak) for c in results]
                print(f"\nblocks, milliseconds (medians):\n{table(results, singles, peak)}", flush=True)
            if arguments.only != "blocks":
                progress("network", 0, 1)
                budget = 4 * arguments.seconds
                network = compare("network", model, x, every, threads=threads, seconds=budget, network=True)
                progress.clear()
                content["network"] = record(network, every, peak)
                print(f"\nnetwork:\n{peer_table(network, every, peak)}")
                results.append(network)
        finally:
            progress.clear()
        for line in missing_lines(results):
            print(line)
    if arguments.json:
        write_json(arguments.json, "compare", content)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, as `mbv2-kernels` does."""
    parser = Parser(
        prog="compare.py",
        description=(__doc__ or "").split("\n\n")[0],
        parents=[network_options(), fp16_options(), timing_options(), output_options()],
    )
    parser.add_argument("--peers", metavar="NAMES", help="only these besides ours, separated by commas")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.set_defaults(run=compare_command, argv=argv)
    return run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
