"""Gluon without a GPU: runs the functions of triton/gluon_kernels.py, unchanged, over torch tensors on the CPU.

`load_kernels()` executes that file with stand-ins for the modules that it imports (so Triton need not be installed). A
program is run statement by statement, every operation on whole tensors: layouts mean nothing here, nor do threads.

What it finds, beside wrong numbers:
    an address outside the tensors given, or outside a shared allocation
    shared or global memory that is read before it is written: it is NaN
    an asynchronous copy that is read before it was waited for and a barrier passed: NaN
    an asynchronous copy into what was read, or is read by a wgmma still running, since the last barrier: an error
    a wgmma that reads what was written without a fence and a barrier: NaN
    // and % of negative numbers, which the device computes differently: an error
Between ordinary reads and writes of shared memory Triton puts barriers by itself. Where one is needed it is counted,
once for each line of the kernel, in `IMPLICIT`: the kernel is written so that its loop over chunks needs none.
"""

from __future__ import annotations

import itertools
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mbv2_kernels.triton import gluon_index

KERNELS = Path(gluon_index.__file__).with_name("gluon_kernels.py")


class DType:
    """A Gluon type: its name is all that the kernel asks of it."""

    def __init__(self, name: str, torch_type: torch.dtype):
        self.name, self.torch, self.value = name, torch_type, self

    def __str__(self) -> str:
        return self.name


FP32, FP16, BF16 = DType("fp32", torch.float32), DType("fp16", torch.float16), DType("bf16", torch.bfloat16)
INT32, INT64 = DType("int32", torch.int32), DType("int64", torch.int64)
TYPES = {t.torch: t for t in (FP32, FP16, BF16, INT32, INT64)}


class Block:
    """A tensor of the kernel. Operators make new ones (`a += b` too, as in Triton)."""

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent=None))

    def __init__(self, data: Tensor):
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> DType:
        return TYPES[self.data.dtype]

    def to(self, dtype: DType) -> Block:
        return Block(self.data.to(dtype.torch))

    def __getitem__(self, index: Any) -> Block:
        return Block(self.data[index])

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


def data(value: Any) -> Any:
    return value.data if isinstance(value, Block) else value


def _operator(name: str, swapped: bool) -> Callable[[Block, Any], Block]:
    def apply(self: Block, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = torch.as_tensor(self.data), data(other)
        if name in ("__floordiv__", "__mod__"):
            a, b = (torch.as_tensor(b), a) if swapped else (a, b)
            assert bool((a >= 0).all()) and bool(torch.as_tensor(b > 0).all()), "the device divides otherwise"
            return Block(getattr(a, name)(b))
        return Block(getattr(a, name)(b))

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Block, f"__{_name}__", _operator(f"__{_name}__", False))
for _name in ("add", "sub", "mul", "and", "or"):
    setattr(Block, f"__r{_name}__", _operator({"sub": "__rsub__"}.get(_name, f"__{_name}__"), True))


class Pointer:
    """Addresses in bytes. A pointer alone has one; indices make a block of them."""

    def __init__(self, address: Tensor, element: DType):
        self.address, self.element = address, element
        self.dtype = types.SimpleNamespace(element_ty=element)

    def __add__(self, index: Any) -> Pointer:
        return Pointer(self.address + torch.as_tensor(data(index)).long() * self.element.torch.itemsize, self.element)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.address[index], self.element)


class Machine:
    """Global memory, the program that runs, and what of its shared memory waits for which event."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = [(t.data_ptr(), torch.as_strided(t, (t.numel(),), (1,))) for t in tensors]
        self.program = (0, 0)
        self.warps = 4
        self.shared: list[Shared] = []
        self.running: list[Shared] = []  # read by a wgmma that was not waited for

    def find(self, pointer: Pointer, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(flat tensor, its indices, where they are in the block); an address in none of the tensors is an error."""
        address = pointer.address
        left = mask.clone()
        for start, flat in self.tensors:
            here = left & (address >= start) & (address < start + flat.numel() * flat.itemsize)
            if here.any():
                assert flat.dtype == pointer.element.torch
                offset = address[here] - start
                assert (offset % flat.itemsize == 0).all()
                yield flat, offset // flat.itemsize, here
                left &= ~here
        assert not left.any(), f"{int(left.sum())} addresses outside every tensor"


MACHINE = Machine([])
IMPLICIT: Counter[int] = Counter()


def _implicit_barrier() -> None:
    frame = sys._getframe(1)
    while frame.f_code.co_filename != str(KERNELS) or frame.f_code.co_name.startswith("_"):
        assert frame.f_back is not None
        frame = frame.f_back
    IMPLICIT[frame.f_lineno] += 1
    barrier()


class Shared:
    """An allocation, or a view of one. The flags of an element belong to it like its value. "unseen" by wgmma: 1 before
    a fence, 2 before a barrier after the write."""

    COPYING, ARRIVED = 1, 2  # an asynchronous copy: begun; waited for, by its own thread alone

    def __init__(self, dtype: DType, values: Tensor, flags: dict[str, Tensor]):
        self.dtype, self.values, self.flags = dtype, values, flags
        self.shape = list(values.shape)

    def _view(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(self.dtype, view(self.values), {name: view(flag) for name, flag in self.flags.items()})

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(lambda t: t.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert start + length <= self.shape[dim]
        return self._view(lambda t: t.narrow(dim, start, length))

    def _at(self, index: Block, axis: int) -> Shared:
        assert axis == 0 and bool((index.data >= 0).all()) and bool((index.data < self.shape[0]).all())
        return self._view(lambda t: t[index.data.long()])

    def _read(self, part: Shared) -> Tensor:
        if part.flags["written"].any():
            _implicit_barrier()
        unsafe = part.flags["copy"] != 0
        return part.values.masked_fill(unsafe, float("nan")) if unsafe.any() else part.values.clone()

    def load(self, layout: Any = None) -> Block:
        values = self._read(self)
        self.flags["read"].fill_(True)
        return Block(values)

    def gather(self, index: Block, axis: int) -> Block:
        values = self._read(self._at(index, axis))
        self.flags["read"][index.data.long()] = True
        return Block(values)

    def store(self, value: Block) -> None:
        if (self.flags["read"] | self.flags["written"]).any():
            _implicit_barrier()
        assert not (self.flags["copy"] != 0).any() and value.dtype is self.dtype
        self.values.copy_(value.data)
        self.flags["written"].fill_(True)
        self.flags["unseen"].fill_(3)

    def scatter(self, value: Block, index: Block, axis: int) -> None:
        part, i = self._at(index, axis), index.data.long()
        if (part.flags["read"] | part.flags["written"]).any():
            _implicit_barrier()
        assert value.dtype is self.dtype
        self.values[i] = value.data
        # which of two threads stores last to one element is not known: they have to agree (a NaN agrees with a NaN)
        kept, mine = self.values[i].float(), value.data.float()
        assert bool(((kept == mine) | (kept.isnan() & mine.isnan())).all()), "two values for one element"
        self.flags["written"][i] = True
        self.flags["unseen"][i] = 3

    def begin_copy(self, values: Tensor) -> None:
        assert not self.flags["read"].any(), "a copy into what is read since the last barrier"
        assert not self.flags["written"].any() and not (self.flags["copy"] != 0).any(), "two writes, no barrier"
        self.values.copy_(values)
        self.flags["copy"].fill_(self.COPYING)
        self.flags["unseen"].fill_(3)

    def read_by_wgmma(self) -> Tensor:
        unsafe = (self.flags["copy"] != 0) | (self.flags["unseen"] != 0)
        self.flags["read"].fill_(True)
        MACHINE.running.append(self)
        return self.values.masked_fill(unsafe, float("nan"))


def barrier() -> None:
    for shared in MACHINE.shared:
        flags = shared.flags
        flags["read"].fill_(False)
        flags["written"].fill_(False)
        flags["unseen"][flags["copy"] != Shared.COPYING] &= 1
        flags["copy"][flags["copy"] == Shared.ARRIVED] = 0
    for shared in MACHINE.running:
        shared.flags["read"].fill_(True)


def fence_async_shared() -> None:
    for shared in MACHINE.shared:
        shared.flags["unseen"][shared.flags["copy"] != Shared.COPYING] &= 2


def wait_group(pending: int) -> None:
    assert pending == 0
    for shared in MACHINE.shared:
        done = (shared.flags["copy"] == Shared.COPYING) & shared.flags["committed"]
        shared.flags["copy"][done] = Shared.ARRIVED


def commit_group() -> None:
    for shared in MACHINE.shared:
        shared.flags["committed"].copy_(shared.flags["copy"] == Shared.COPYING)


def async_load(shared: Shared, pointer: Pointer, mask: Block) -> None:
    shared.begin_copy(load(pointer, mask, 0.0).data)


def allocate_shared_memory(dtype: DType, shape: list[int], layout: Any) -> Shared:
    values = torch.full(shape, float("nan") if dtype.torch.is_floating_point else -(10**6), dtype=dtype.torch)
    flags = {name: torch.zeros(shape, dtype=torch.bool) for name in ("read", "written", "committed")}
    flags |= {name: torch.zeros(shape, dtype=torch.uint8) for name in ("copy", "unseen")}
    shared = Shared(dtype, values, flags)
    MACHINE.shared.append(shared)
    return shared


# ---- Operations -----------------------------------------------------------------------------------------------------


def _mask(pointer: Pointer, mask: Any) -> Tensor:
    return torch.as_tensor(True if mask is None else data(mask)).expand(pointer.address.shape)


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Block:
    values = torch.full(pointer.address.shape, float("nan") if other is None else other, dtype=pointer.element.torch)
    for flat, index, here in MACHINE.find(pointer, _mask(pointer, mask)):
        values[here] = flat[index]
    return Block(values)


def store(pointer: Pointer, value: Block, mask: Any = None) -> None:
    assert value.dtype is pointer.element
    for flat, index, here in MACHINE.find(pointer, _mask(pointer, mask)):
        assert len(index.unique()) == len(index), "one address, two values"
        assert flat[index].isnan().all(), "written twice"
        flat[index] = value.data.expand(here.shape)[here]


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return Pointer(torch.where(data(condition), a.address, b.address), a.element)
    return Block(torch.where(data(condition), data(a), data(b)))


def minimum(a: Any, b: Any) -> Block:
    return Block(
        torch.minimum(torch.as_tensor(data(a)), torch.as_tensor(data(b), dtype=torch.as_tensor(data(a)).dtype))
    )


def fma(a: Block, b: Block, c: Block) -> Block:
    return Block((a.data.double() * b.data.double() + c.data.double()).float())


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Block], dtype: DType, is_pure: bool, pack: int
) -> Block:
    """Two elements at a time: a 16-bit operand is one register of two, a 32-bit one two registers."""
    assert is_pure and pack == 2 and constraints.startswith("=r")
    packed = {"fp16": "f16x2", "bf16": "bf16x2"}[dtype.name]
    registers = itertools.count(1)
    values: dict[str, Tensor] = {}
    for arg in args:
        pairs = torch.broadcast_to(arg.data, args[0].data.shape).reshape(-1, 2)
        parts = (pairs,) if arg.data.dtype.itemsize == 2 else (pairs[:, 0], pairs[:, 1])
        values |= {f"${next(registers)}": part for part in parts}
    assert len(constraints.split(",")) == len(values) + 1
    for line in filter(None, (part.strip(" {}") for part in asm.split(";"))):
        name, *operands = re.split(r"[ ,]+", line)
        operation, *modifiers = name.split(".")
        if operation == "":  # .reg
            continue
        sources = [
            torch.tensor([int(o, 0) & 0xFFFF], dtype=torch.int16).view(dtype.torch) if o[0].isdigit() else values[o]
            for o in operands[1:]
        ]
        if operation == "mov":
            result = sources[0]
        elif operation == "cvt":  # the first source becomes the upper half
            assert modifiers[0] == "rn" and modifiers[-2:] == [packed, "f32"]
            result = torch.stack(sources[::-1], 1)
            result = (result.relu() if "relu" in modifiers else result).to(dtype.torch)
        elif operation in ("min", "max"):
            assert modifiers == ["NaN", packed]  # as torch: NaN of a NaN
            result = getattr(torch, f"{operation}imum")(*sources)
        else:
            assert name == "fma.rn.f16x2"
            a, b, c = (source.double() for source in sources)
            result = (a * b + c).half()
        values[operands[0]] = result
    return Block(values["$0"].reshape(args[0].data.shape))


def _matmul(a: Tensor, b: Tensor, acc: Block, use_acc: bool = True) -> Block:
    product = (a.double() @ b.double()).float()
    return Block(acc.data + product if use_acc else product)


def mma_v2(a: Block, b: Block, acc: Block) -> Block:
    return _matmul(a.data, b.data, acc)


def warpgroup_mma(a: Any, b: Shared, acc: Block, use_acc: bool = True, is_async: bool = False) -> Block:
    assert is_async
    left = a.read_by_wgmma() if isinstance(a, Shared) else a.data
    return _matmul(left, b.read_by_wgmma(), acc, use_acc)


def warpgroup_mma_wait(pending: int, deps: list[Block]) -> Any:
    assert pending == 0
    MACHINE.running.clear()
    return tuple(deps) if len(deps) > 1 else deps[0]


class Kernel:
    """A function decorated with gluon.jit: called by another one, or launched on a grid."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.arg_names = function.__code__.co_varnames[: function.__code__.co_argcount]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            global MACHINE
            MACHINE = Machine([a for a in args if isinstance(a, Tensor)])
            MACHINE.warps = num_warps
            pointers = [
                Pointer(torch.tensor(a.data_ptr()), TYPES[a.dtype]) if isinstance(a, Tensor) else a for a in args
            ]
            for MACHINE.program in itertools.product(*map(range, grid)):
                MACHINE.shared.clear()
                self.function(*pointers, **options)
                assert not MACHINE.running, "a wgmma nobody waited for"

        return launch


def _jit(function: Any = None, **options: Any) -> Any:
    return Kernel(function) if function else Kernel


def load_kernels(edit: Callable[[str], str] = lambda source: source) -> types.ModuleType:
    """The module gluon_kernels.py over these operations; `edit` changes its text first, to see that tests fail."""
    layouts = ("NVMMADistributedLayout", "DistributedLinearLayout", "BlockedLayout", "SwizzledSharedLayout")
    layouts += ("NVMMASharedLayout", "DotOperandLayout", "SliceLayout")
    language = types.SimpleNamespace(
        **{name: lambda *args: None for name in layouts},
        constexpr=None, float16=FP16, float32=FP32, int32=INT32, int64=INT64,
        arange=lambda start, stop, layout=None: Block(torch.arange(start, stop, dtype=torch.int32)),
        zeros=lambda shape, dtype, layout=None: Block(torch.zeros(shape, dtype=dtype.torch)),
        zeros_like=lambda block: Block(torch.zeros_like(block.data)),
        convert_layout=lambda block, layout, assert_trivial=False: block,
        reshape=lambda block, shape: Block(block.data.reshape(shape)),
        program_id=lambda axis: Block(torch.tensor(MACHINE.program[axis], dtype=torch.int32)),
        num_warps=lambda: MACHINE.warps,
        static_range=range, load=load, store=store, where=where, minimum=minimum, fma=fma, barrier=barrier,
        inline_asm_elementwise=inline_asm_elementwise, allocate_shared_memory=allocate_shared_memory,
    )  # fmt: skip
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.__dict__.update(jit=_jit, constexpr_function=lambda f: f, language=language)
    async_copy = types.SimpleNamespace(async_load=async_load, commit_group=commit_group, wait_group=wait_group)
    ampere = types.SimpleNamespace(async_copy=async_copy, mma_v2=mma_v2)
    hopper = types.SimpleNamespace(
        fence_async_shared=fence_async_shared, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait
    )
    stand_ins = {
        "triton": types.ModuleType("triton"), "triton.experimental": gluon, "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia": language,
        "triton.experimental.gluon.language.nvidia.ampere": ampere,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }  # fmt: skip
    gluon.gluon = gluon  # type: ignore[attr-defined]
    module = types.ModuleType("mbv2_kernels.triton.gluon_kernels")
    module.__package__ = "mbv2_kernels.triton"
    with mock.patch.dict(sys.modules, stand_ins):  # type: ignore[arg-type]
        exec(compile(edit(KERNELS.read_text()), str(KERNELS), "exec"), module.__dict__)
    return module
