"""Runs the PTX that Triton made of a kernel, on the CPU: all threads of a program, in NumPy, statement by statement.

What a compiler decides and no source shows is here: layouts, addresses, vector widths, inline assembly, tensor-core
fragments and descriptors, and every barrier. Of a race it does not see the outcome (threads run in lockstep) but the
cause. These are errors:

    two warps on one byte of shared memory, one of them writing another value, without a barrier in between
    a read of what cp.async is still bringing, or a write to it; the bytes that arrive show only at the wait
    a wgmma that reads what was written without a fence and a barrier behind it, or that changes before its wait
    an address outside the tensors given or outside shared memory (which is NaN at the start)
    threads that take different ways at a branch

Instructions as in NVIDIA's "PTX ISA"; those that Triton's kernels here use, and an error for any other. Sums of a
tensor core are formed in fp64 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Values = np.ndarray[Any, Any]


def bits_of(kind: str) -> int:
    return int(re.search(r"\d+", kind.replace("x2", ""))[0]) * (2 if "x2" in kind else 1)  # type: ignore[index]


def floats(v: Values, kind: str) -> Values:
    """Register bits as float32 values; a pair (f16x2, bf16x2) becomes two columns, the lower half first."""
    if kind.endswith("x2"):
        return floats(v.astype(np.uint32).view(np.uint16).reshape(-1, 2), kind[:-2])
    if kind == "f32":
        return v.astype(np.uint32).view(np.float32)
    if kind == "f16":
        return v.astype(np.uint16).view(np.float16).astype(np.float32)
    assert kind == "bf16", kind
    return (v.astype(np.uint32) << 16).view(np.float32)


def encode(v: Values, kind: str) -> Values:
    """The reverse, rounding to nearest even."""
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(v, kind[:-2])).view(np.uint32)[:, 0]
    if kind == "f32":
        return np.ascontiguousarray(v, np.float32).view(np.uint32)
    if kind == "f16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(v).astype(np.float16).view(np.uint16)
    assert kind == "bf16", kind
    tensor = torch.from_numpy(np.ascontiguousarray(v)).to(torch.bfloat16)
    return tensor.view(torch.int16).numpy().view(np.uint16)


def integers(v: Values, kind: str) -> Values:
    return (
        v.astype(BITS[bits_of(kind)]).view(f"i{bits_of(kind) // 8}")
        if kind[0] == "s"
        else v.astype(BITS[bits_of(kind)])
    )


def matrix_multiply(a: Values, b: Values) -> Values:
    with np.errstate(invalid="ignore", over="ignore"):
        return a.astype(np.float64) @ b.astype(np.float64)


def mark(flags: Values, index: Values, warp: Values) -> None:
    """flags[index] |= warp, whose bits are in order."""
    first = np.flatnonzero(np.diff(warp, prepend=0))
    for start, stop in zip(first, [*first[1:], len(warp)], strict=True):
        flags[index[start:stop].reshape(-1)] |= warp[start]


class PtxError(Exception):
    pass


class Shared:
    """The shared memory of a program, and who has touched each byte since the last barrier."""

    def __init__(self, size: int):
        self.bytes = np.full(size, 255, np.uint8)  # NaN in every type
        self.readers = np.zeros(size, np.uint16)  # a bit for each warp
        self.writers = np.zeros(size, np.uint16)
        self.coming = np.zeros(size, bool)  # cp.async, not waited for
        self.unseen = np.zeros(size, np.uint8)  # by wgmma: 1 without a fence, 2 without a barrier since the write
        self.groups: list[list[tuple[Values, Values, Values]]] = [[]]
        self.running: list[tuple[Values, Values, int]] = []  # what a wgmma reads: addresses, contents, warps

    def read(self, index: Values, warp: Values) -> Values:
        """index [threads, bytes]; warp [threads]: a bit each."""
        assert (index >= 0).all() and (index < len(self.bytes)).all(), "outside shared memory"
        assert not self.coming[index].any(), "read while cp.async brings it"
        assert not (self.writers[index] & ~warp[:, None]).any(), "read what another warp wrote, no barrier between"
        mark(self.readers, index, warp)
        return self.bytes[index]

    def _claim(self, index: Values, values: Values, warp: Values) -> None:
        assert (index >= 0).all() and (index < len(self.bytes)).all(), "outside shared memory"
        changed = self.bytes[index] != values
        others = (self.readers[index] | self.writers[index]) & ~warp[:, None]
        assert not (others != 0)[changed].any(), "changes what another warp reads or writes, no barrier between"
        mark(self.writers, index, warp)

    def write(self, index: Values, values: Values, warp: Values) -> None:
        assert not self.coming[index].any(), "written while cp.async brings it"
        self._claim(index, values, warp)
        self.bytes[index] = values
        assert (self.bytes[index] == values).all(), "two threads, one address, two values"
        self.unseen[index] = 3

    def begin_copy(self, index: Values, values: Values, warp: Values) -> None:
        assert not self.coming[index].any(), "two cp.async at a time"
        self._claim(index, values, warp)
        self.coming[index] = True
        self.groups[-1].append((index, values, warp))

    def wait(self, pending: int) -> None:
        while len(self.groups) - 1 > pending:
            for index, values, warp in self.groups.pop(0):
                self.coming[index] = False
                self.write(index, values, warp)

    def read_by_wgmma(self, index: Values, warps: int) -> Values:
        assert (index < len(self.bytes)).all(), "outside shared memory"
        assert not self.coming[index].any(), "wgmma reads what is not there yet"
        assert not self.unseen[index].any(), "wgmma reads what was written without a fence and a barrier"
        self.running.append((index, self.bytes[index], warps))
        return self.bytes[index]

    def wait_wgmma(self) -> None:
        for index, contents, warps in self.running:
            assert (self.bytes[index] == contents).all() and not self.coming[index].any(), "a running wgmma's operand"
            self.readers[index] |= np.uint16(warps)
        self.running.clear()

    def barrier(self) -> None:
        self.readers[:] = 0
        self.writers[:] = 0
        self.unseen &= 1

    def fence(self) -> None:
        self.unseen[~self.coming] &= 2


class Global:
    """The tensors of a launch, one after the other with nothing between; every access has to hit one."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.flat = [torch.as_strided(t, (t.numel(),), (1,)).view(torch.uint8).numpy() for t in tensors]
        self.starts = [(i + 1) << 40 for i in range(len(tensors))]

    def _find(self, address: Values, width: int) -> list[tuple[Values, Values, Values]]:
        found = []
        for flat, start in zip(self.flat, self.starts, strict=True):
            offset = address.astype(np.int64) - start
            here = (offset >= 0) & (offset + width <= len(flat))
            if here.any():
                found.append((flat, offset[here][:, None] + np.arange(width), np.flatnonzero(here)))
        assert sum(len(where) for _, _, where in found) == len(address), "outside every tensor"
        return found

    def read(self, address: Values, width: int) -> Values:
        assert (address % np.uint64(width) == 0).all(), "misaligned"
        values = np.zeros((len(address), width), np.uint8)
        for flat, index, where in self._find(address, width):
            values[where] = flat[index]
        return values

    def write(self, address: Values, values: Values) -> None:
        assert (address % np.uint64(values.shape[1]) == 0).all(), "misaligned"
        for flat, index, where in self._find(address, values.shape[1]):
            flat[index] = values[where]


class Program:
    """Instructions, parsed once: (predicate, operation with its modifiers, operands)."""

    def __init__(self, ptx: str):
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
        body = ptx[ptx.index("{", ptx.index(".reqntid")) + 1 :].split("$L__func_end")[0]
        body = re.sub(r"//.*|^\s*\.(file|section|pragma).*$", "", body, flags=re.M)
        body = re.sub(r"^\s*\.loc\s+\d+ (\d+) .*$", r"line \1;", body, flags=re.M)
        body = re.sub(r"(\$?\w+):\s", r"label \1;", body)
        self.code: list[tuple[str, list[str], list[str], int]] = []
        line = 0  # of the kernel's source
        self.labels: dict[str, int] = {}
        for piece in body.split(";"):
            text = piece.lstrip("{} \n\t").strip()
            if text.startswith("label "):
                self.labels[text.split()[1]] = len(self.code)
            elif text.startswith("line "):
                line = int(text.split()[1])
            elif text and not text.startswith((".reg", "}")):
                found = re.match(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
                assert found, text
                predicate, name, operands = found.groups()
                parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
                self.code.append(
                    (predicate or "", name.replace("::", ".").split("."), [p.strip() for p in parts], line)
                )

    def run(self, grid: tuple[int, int], tensors: list[Any], shared_bytes: int) -> None:
        """Runs one program of the grid. `tensors`: the kernel's arguments that are no constants, in order."""
        Run(self, grid, tensors, shared_bytes).run()


class Run:
    def __init__(self, program: Program, grid: tuple[int, int], arguments: list[Any], shared_bytes: int):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        self.program, self.shared, self.memory = program, Shared(shared_bytes), Global(tensors)
        starts = iter(self.memory.starts)
        self.parameters = [next(starts) if isinstance(a, torch.Tensor) else a for a in arguments] + [0, 0]
        self.threads = program.threads
        thread = np.arange(self.threads)
        self.lane = thread % 32
        self.warp = (1 << (thread // 32)).astype(np.uint16)
        special = {"%tid.x": thread, "%ctaid.x": grid[0], "%ctaid.y": grid[1], "global_smem": 0, "%laneid": self.lane}
        special["%nctaid.x"] = 1  # where it matters, one program does all the work
        self.registers: dict[str, Values] = {k: np.broadcast_to(np.uint32(v), self.threads) for k, v in special.items()}

    def get(self, operand: str) -> Values:
        if operand in self.registers:
            return self.registers[operand]
        is_float = operand.startswith("0f")
        number = int(operand[2:], 16) if is_float else int(operand.rstrip("U"), 0) & (1 << 64) - 1
        return np.full(self.threads, number, np.uint64)

    def put(self, name: str, value: Values, active: Values | None) -> None:
        if name == "_":
            return
        if active is not None and not active.all():
            value = np.where(active, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def address(self, operand: str) -> Values:
        base, _, offset = operand.strip("[] ").partition("+")
        value = self.get(base.strip()).astype(np.int64)
        return value + (int(offset, 0) if offset else 0)

    def run(self) -> None:
        at, code = 0, self.program.code
        while at < len(code):
            predicate, name, operands, line = code[at]
            at += 1
            active = None
            if predicate:
                active = self.registers[predicate.lstrip("!")]
                active = ~active if predicate[0] == "!" else active
            if name[0] == "bra":
                taken = np.ones(1, bool) if active is None else active
                assert taken.all() or not taken.any(), "threads part at a branch"
                at = self.program.labels[operands[0]] if taken[0] else at
            elif name[0] == "ret":
                break
            else:
                try:
                    self.step(name, operands, active)
                except (AssertionError, NotImplementedError) as error:
                    raise PtxError(
                        f"{error} (line {line} of the kernel: {'.'.join(name)} {', '.join(operands)[:99]})"
                    ) from error
        assert not self.shared.running and not self.shared.groups[0], "left before what was begun had ended"

    def step(self, name: list[str], operands: list[str], active: Values | None) -> None:
        handler: Callable[..., None] | None = getattr(self, f"do_{name[0]}", None)
        if handler is not None:
            handler(name, operands, active)
            return
        sources = [self.get(o) for o in operands[1:]]
        with np.errstate(all="ignore"):
            self.put(operands[0], self.compute(name, sources), active)

    def compute(self, name: list[str], sources: list[Values]) -> Values:
        operation, kind = name[0], name[-1]
        if kind[0] in "fb" and kind not in ("b8", "b16", "b32", "b64", "fxn") and operation in FLOAT:
            assert "rn" in name or operation in ("min", "max", "add", "sub", "mul", "neg", "abs")
            a = [floats(s, kind) for s in sources]
            return encode(FLOAT[operation](name, *a), kind)
        width = BITS[bits_of(kind)]
        a = [integers(s, kind) for s in sources]
        if operation in INTEGER:
            return INTEGER[operation](*a).astype(a[0].dtype).view(width)
        if operation in ("shl", "shr"):
            amount = np.minimum(sources[1].astype(np.int64), bits_of(kind))
            wide = a[0].astype(np.int64 if kind[0] == "s" else np.uint64)
            count = np.minimum(amount, 63).astype(wide.dtype)
            shifted = wide << count if operation == "shl" else wide >> count
            zero = amount >= bits_of(kind) if kind[0] != "s" else np.zeros(1, bool)
            return np.where(zero, 0, shifted).astype(width)
        if operation in ("mul", "mad"):
            big = np.int64 if kind[0] == "s" else np.uint64
            product = a[0].astype(big) * a[1].astype(big)
            if "hi" in name:
                assert bits_of(kind) <= 32
                product = product >> big(bits_of(kind))
            if operation == "mad":
                product = product + sources[2].astype(big)
            return product.astype(BITS[2 * bits_of(kind)] if "wide" in name else width)
        if operation == "bfe":
            position, length = (int(s[0]) for s in sources[1:])
            part = a[0].view(np.uint32).astype(np.int64) >> position & (1 << length) - 1
            if kind[0] == "s":
                part = np.where(part >> (length - 1) & 1, part - (1 << length), part)
            return part.astype(np.uint32)
        if operation == "prmt":
            octets = np.stack([sources[i].astype(np.uint32).view(np.uint8).reshape(-1, 4) for i in (0, 1)], 1)
            chosen = [int(sources[2][0]) >> (4 * i) & 15 for i in range(4)]
            assert max(chosen) < 8
            return np.ascontiguousarray(octets.reshape(-1, 8)[:, chosen]).view(np.uint32)[:, 0]
        raise NotImplementedError(".".join(name))

    # Moves, comparisons, conversions

    def do_mov(self, name: list[str], operands: list[str], active: Values | None) -> None:
        to, source = operands
        if to.startswith("{"):
            parts = [p.strip() for p in to.strip("{} ").split(",")]
            width = bits_of(name[-1]) // len(parts)
            value = self.get(source).astype(BITS[bits_of(name[-1])])
            for i, part in enumerate(parts):
                self.put(part, (value >> value.dtype.type(i * width)).astype(BITS[width]), active)
        elif source.startswith("{"):
            parts = [p.strip() for p in source.strip("{} ").split(",")]
            width, big = bits_of(name[-1]) // len(parts), BITS[bits_of(name[-1])]
            values = [self.get(part).astype(BITS[width]).astype(big) << big(i * width) for i, part in enumerate(parts)]
            self.put(to, np.bitwise_or.reduce(values), active)
        else:
            value = self.get(source)
            self.put(to, value != 0 if name[-1] == "pred" else value.astype(BITS[bits_of(name[-1])]), active)

    def do_ld(self, name: list[str], operands: list[str], active: Values | None) -> None:
        to = [p.strip() for p in operands[0].strip("{} ").split(",")]
        width = bits_of(name[-1]) // 8
        if "param" in name:
            number = int(re.search(r"param_(\d+)", operands[1])[1])  # type: ignore[index]
            value = self.parameters[number] & (1 << 8 * width) - 1
            self.put(to[0], np.full(self.threads, value, BITS[8 * width]), active)
            return
        on = np.ones(self.threads, bool) if active is None else active
        address, values = self.address(operands[1])[on], np.zeros((self.threads, width * len(to)), np.uint8)
        if on.any() and "shared" in name:
            assert (address % (width * len(to)) == 0).all(), "misaligned"
            values[on] = self.shared.read(address[:, None] + np.arange(width * len(to)), self.warp[on])
        elif on.any():
            values[on] = self.memory.read(address.view(np.uint64), width * len(to))
        for i, part in enumerate(to):
            self.put(
                part, np.ascontiguousarray(values[:, i * width : (i + 1) * width]).view(BITS[8 * width])[:, 0], active
            )

    def do_st(self, name: list[str], operands: list[str], active: Values | None) -> None:
        width = BITS[bits_of(name[-1])]
        parts = [self.get(p.strip()).astype(width) for p in operands[1].strip("{} ").split(",")]
        values = np.stack(parts, 1).view(np.uint8)
        on = np.ones(self.threads, bool) if active is None else active
        if not on.any():
            return
        address = self.address(operands[0])[on]
        if "shared" in name:
            assert (address % values.shape[1] == 0).all(), "misaligned"
            self.shared.write(address[:, None] + np.arange(values.shape[1]), values[on], self.warp[on])
        else:
            self.memory.write(address.view(np.uint64), values[on])

    def do_selp(self, name: list[str], operands: list[str], active: Values | None) -> None:
        a, b, condition = (self.get(o) for o in operands[1:])
        self.put(operands[0], np.where(condition, a, b).astype(BITS[bits_of(name[-1])]), active)

    def do_setp(self, name: list[str], operands: list[str], active: Values | None) -> None:
        compare, kind = name[1], name[-1]
        a, b = (floats(v, kind) if kind[0] == "f" else integers(v, kind) for v in map(self.get, operands[1:]))
        with np.errstate(invalid="ignore"):
            result = COMPARE[compare](a, b)
        self.put(operands[0], result, active)

    def do_and(self, name: list[str], operands: list[str], active: Values | None) -> None:
        a, b = map(self.get, operands[1:])
        result = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name[0]]
        if name[-1] == "pred":
            self.put(operands[0], result(a != 0, b != 0), active)
        else:
            width = BITS[bits_of(name[-1])]
            self.put(operands[0], result(a.astype(width), b.astype(width)), active)

    do_or = do_xor = do_and

    def do_not(self, name: list[str], operands: list[str], active: Values | None) -> None:
        value = self.get(operands[1])
        self.put(operands[0], ~(value if name[-1] == "pred" else value.astype(BITS[bits_of(name[-1])])), active)

    def do_cvt(self, name: list[str], operands: list[str], active: Values | None) -> None:
        to, source = name[-2:]
        if to.endswith("x2"):
            assert "rn" in name and source == "f32"
            pair = np.stack([floats(self.get(o), "f32") for o in operands[:0:-1]], 1)  # the first is the upper half
            if "relu" in name:
                pair = np.maximum(pair, np.float32(0))  # NaN stays, in NumPy too
            self.put(operands[0], encode(pair, to), active)
            return
        value = self.get(operands[1])
        if "f" in to and "f" in source:
            self.put(operands[0], encode(floats(value, source), to), active)
        else:
            assert "f" not in to + source, name
            wide = integers(value, source).astype(f"{'i' if source[0] == 's' else 'u'}8")
            self.put(operands[0], wide.astype(BITS[bits_of(to)]), active)

    # Copies, barriers, tensor cores

    def do_cp(self, name: list[str], operands: list[str], active: Values | None) -> None:
        if "commit_group" in name:
            self.shared.groups.append([])
            return
        if "wait_group" in name:
            self.shared.wait(int(operands[0], 0))
            return
        assert name[:3] == ["cp", "async", "cg"] or name[:3] == ["cp", "async", "ca"]
        size = int(operands[2], 0)
        on = np.ones(self.threads, bool) if active is None else active
        if not on.any():
            return
        to, source = self.address(operands[0])[on], self.address(operands[1])[on].view(np.uint64)
        given = self.get(operands[3])[on].astype(np.int64) if len(operands) > 3 else np.full(len(to), size)
        assert (to % size == 0).all() and np.isin(given, (0, size)).all()
        values = np.zeros((len(to), size), np.uint8)
        if (given > 0).any():
            values[given > 0] = self.memory.read(source[given > 0], size)
        self.shared.begin_copy(to[:, None] + np.arange(size), values, self.warp[on])

    def do_bar(self, name: list[str], operands: list[str], active: Values | None) -> None:
        if name[:3] != ["bar", "warp", "sync"]:
            assert operands == ["0"] and active is None
            self.shared.barrier()

    do_barrier = do_bar

    def do_fence(self, name: list[str], operands: list[str], active: Values | None) -> None:
        assert "proxy" in name and "async" in name
        self.shared.fence()

    def do_shfl(self, name: list[str], operands: list[str], active: Values | None) -> None:
        assert name[:3] == ["shfl", "sync", "idx"] and operands[3] == "31"
        values = self.get(operands[1]).reshape(-1, 32)
        source = self.get(operands[2]).astype(np.int64).reshape(-1, 32) % 32
        self.put(operands[0], np.take_along_axis(values, source, 1).reshape(-1), active)

    def _matrices(self, operand: str, count: int) -> Values:
        """Byte addresses [warps, count, 8 rows, 16] of the 8 x 8 matrices whose rows lanes point to."""
        rows = self.address(operand).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)
        assert (rows % 16 == 0).all()
        return rows[..., None] + np.arange(16)

    def do_ldmatrix(self, name: list[str], operands: list[str], active: Values | None) -> None:
        to = [p.strip() for p in operands[0].strip("{} ").split(",")]
        index = self._matrices(operands[1], len(to))
        warps = (1 << np.arange(len(index))).astype(np.uint16)
        octets = self.shared.read(index.reshape(len(index), -1), warps).reshape(index.shape)
        elements = np.ascontiguousarray(octets).view(np.uint16)  # [warps, count, 8, 8]
        if "trans" in name:
            elements = elements.swapaxes(2, 3)
        pairs = np.ascontiguousarray(elements).view(np.uint32)  # lane 4 * row + pair
        for i, part in enumerate(to):
            self.put(part, pairs[:, i].reshape(-1), active)

    def do_stmatrix(self, name: list[str], operands: list[str], active: Values | None) -> None:
        parts = [self.get(p.strip()).astype(np.uint32) for p in operands[1].strip("{} ").split(",")]
        index = self._matrices(operands[0], len(parts))
        elements = np.stack([p.reshape(-1, 8, 4) for p in parts], 1).view(np.uint16)
        if "trans" in name:
            elements = elements.swapaxes(2, 3)
        octets = np.ascontiguousarray(elements).view(np.uint8).reshape(len(index), -1)
        self.shared.write(index.reshape(len(index), -1), octets, (1 << np.arange(len(index))).astype(np.uint16))

    def _fragment(self, operand: str, kind: str) -> Values:
        """Operand A [warps, 16, 16] from four registers a thread."""
        registers = [floats(self.get(p.strip()), f"{kind}x2") for p in operand.strip("{} ").split(",")]
        a = np.zeros((self.threads // 32, 16, 16), np.float32)
        warp, lane = np.arange(self.threads) // 32, self.lane
        for i, pair in enumerate(registers):
            for half in range(2):
                a[warp, lane // 4 + i % 2 * 8, lane % 4 * 2 + i // 2 * 8 + half] = pair[:, half]
        return a

    def _accumulate(self, operands: list[str], product: Values, add: list[str] | None) -> None:
        """product [warps, 16, N], in fp64, added to registers `add` and stored to `operands`."""
        warp, lane = np.arange(self.threads) // 32, self.lane
        for i, to in enumerate(operands):
            value = product[warp, lane // 4 + i % 4 // 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2]
            with np.errstate(invalid="ignore", over="ignore"):
                if add is not None:
                    value = value + floats(self.get(add[i]), "f32")
                self.put(to, encode(value.astype(np.float32), "f32"), None)

    def do_mma(self, name: list[str], operands: list[str], active: Values | None) -> None:
        assert "m16n8k16" in name and name[-4:][0] == "f32" and name[-1] == "f32", name
        kind = name[-3]
        registers = [[p.strip() for p in o.strip("{} ").split(",")] for o in operands]
        b = np.zeros((self.threads // 32, 16, 8), np.float32)
        warp, lane = np.arange(self.threads) // 32, self.lane
        for i, part in enumerate(registers[2]):
            pair = floats(self.get(part), f"{kind}x2")
            for half in range(2):
                b[warp, lane % 4 * 2 + i * 8 + half, lane // 4] = pair[:, half]
        self._accumulate(registers[0], matrix_multiply(self._fragment(operands[1], kind), b), registers[3])

    def _described(self, descriptor: int, rows: int) -> Values:
        """Byte addresses [rows, 32] of a K-major operand: 16 columns of 2 bytes (PTX ISA, matrix descriptor)."""
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        span = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
        assert descriptor >> 49 & 7 == 0
        row = np.arange(rows)
        address = (start + row // 8 * stride + row % 8 * span)[:, None] + np.arange(32)
        return address ^ (address >> 7 & span // 16 - 1) << 4

    def do_wgmma(self, name: list[str], operands: list[str], active: Values | None) -> None:
        if name[1] != "mma_async":
            if name[1] == "wait_group":
                assert operands == ["0"]
                self.shared.wait_wgmma()
            return
        columns, kind = int(re.search(r"n(\d+)k16", ".".join(name))[1]), name[-1]  # type: ignore[index]
        to = [p.strip() for p in operands[0].strip("{} ").split(",")]
        scale = self.get(operands[3])
        assert (scale == scale[0]).all() and set(operands[4:6]) == {"1"} and set(operands[6:]) <= {"0"}
        product = np.zeros((self.threads // 32, 16, columns))
        for group in range(self.threads // 128):
            warps, bits = slice(4 * group, 4 * group + 4), 15 << 4 * group
            a = [self._fragment(operands[1], kind)[warps].reshape(64, 16)] if operands[1].startswith("{") else []
            for operand, rows in ([] if a else [(operands[1], 64)]) + [(operands[2], columns)]:
                values = self.get(operand)[128 * group : 128 * group + 128]
                assert (values == values[0]).all()
                octets = self.shared.read_by_wgmma(self._described(int(values[0]), rows), bits)
                a.append(floats(octets.view(np.uint16), kind))
            product[warps] = matrix_multiply(a[0], a[1].T).reshape(4, 16, columns)
        self._accumulate(to, product, to if scale[0] else None)


INTEGER: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
    "neg": lambda a: -a,
    "div": lambda a, b: np.trunc(a / b).astype(a.dtype),  # 32 bits are exact in a double
    "rem": np.fmod,
}
FLOAT: dict[str, Any] = {
    "add": lambda name, a, b: a + b,
    "sub": lambda name, a, b: a - b,
    "mul": lambda name, a, b: a * b,
    "fma": lambda name, a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "min": lambda name, a, b: np.minimum(a, b) if "NaN" in name else np.fmin(a, b),
    "max": lambda name, a, b: np.maximum(a, b) if "NaN" in name else np.fmax(a, b),
}
COMPARE: dict[str, Any] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "hi": np.greater,
}  # fmt: skip
