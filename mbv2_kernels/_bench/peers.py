"""The contestants that need nothing but torch, and the small interface that every contestant has.

All get the same weights; each may arrange them, and the input, as suits it best before the clock starts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Run = Callable[[], Tensor]


class PeerUnavailable(Exception):
    """This contestant cannot run here; the message says why."""


class Peer:
    """A way to run a network. `ours` marks those that use the fused kernel, `reduced` those that trade exactness."""

    name: str
    ours = False
    reduced = False

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None. Cheap: asked before any work."""
        return None

    def version(self) -> str:
        """Version of the runtime."""
        return torch.__version__

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        """A function that runs the network once on `example` with `threads` threads and returns its output.

        `model` is an unfused eval-mode network; it is left as it is. Raises `PeerUnavailable` with the reason.
        """
        raise NotImplementedError


def _channels_last(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    return model.to(memory_format=torch.channels_last), example.contiguous(memory_format=torch.channels_last)


class Fused(Peer):
    """`mbv2_kernels.fuse(model)`, as a user gets it."""

    name = "fused"
    ours = True

    def version(self) -> str:
        from .. import __version__

        return __version__

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        from .. import fuse

        fused, x = _channels_last(fuse(copy.deepcopy(model)), example)
        return lambda: fused(x)


class FusedFp16(Fused):
    """The same with `set_fp16_accumulation(True)`."""

    name = "fused fp16 sums"
    reduced = True

    def missing(self) -> str | None:
        from ..backends import fp16_accumulation_missing

        return fp16_accumulation_missing()

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        from .. import set_fp16_accumulation

        fused = super().prepare(model, example, threads)

        def run() -> Tensor:
            set_fp16_accumulation(True)
            try:
                return fused()
            finally:
                set_fp16_accumulation(False)

        return run


class Eager(Peer):
    """The model as a user has it: BatchNorm unfolded, NCHW."""

    name = "eager"

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        x = example.contiguous()
        return lambda: model(x)


class Folded(Peer):
    """The best eager mode has: BatchNorm folded into the convolutions, channels_last (oneDNN or cuDNN runs it)."""

    name = "folded channels_last"

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        folded, x = _channels_last(fold_batch_norm(model, example), example)
        return lambda: folded(x)


class Compiled(Peer):
    """torch.compile with freezing (which folds BatchNorm and prepacks weights), channels_last."""

    name = "torch.compile"

    def transform(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        unfrozen, x = _channels_last(self.transform(model), example)
        try:
            compiled = torch.compile(unfrozen, dynamic=False, options={"freezing": True})
            with torch.no_grad():
                compiled(x)
        except Exception as error:  # no compiler, no Python headers, a graph that inductor cannot take, ...
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise PeerUnavailable(f"torch.compile failed: {lines[0] if lines else type(error).__name__}") from error
        return lambda: compiled(x)


class FusedCompiled(Compiled):
    """`torch.compile(mbv2_kernels.fuse(model))` with freezing: what is not fused yet is compiled."""

    name = "fused + torch.compile"
    ours = True

    def transform(self, model: nn.Module) -> nn.Module:
        from .. import fuse

        return fuse(copy.deepcopy(model))


def _activation_of(norm: nn.Module) -> nn.Module | None:
    """What is left of a BatchNorm layer once its affine part is folded away; None for a kind we do not know."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    children = dict(norm.named_children())
    if {"drop", "act"} <= children.keys():  # timm's BatchNormAct2d: the activation sits inside
        return nn.Sequential(children["drop"], children["act"])
    return None


@torch.no_grad()
def fold_batch_norm(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the eval-mode `model` with each BatchNorm folded into the convolution that feeds it, in fp64.

    Which convolution feeds which BatchNorm is seen by running the copy once on `example` and comparing tensors by
    identity, so the way the model is written does not matter. BatchNorms with no such convolution stay.
    """
    folded = copy.deepcopy(model)
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are held so that no id is used twice
    feeds: list[tuple[nn.Conv2d, str]] = []
    handles = []

    def listen(path: str, module: nn.Module) -> None:
        def convolved(conv: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(conv, nn.Conv2d)
            outputs[id(output)] = (conv, output)

        def normalised(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in outputs:
                feeds.append((outputs[id(inputs[0])][0], path))

        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(convolved))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(normalised))

    for path, module in folded.named_modules():
        listen(path, module)
    folded(example)
    for handle in handles:
        handle.remove()
    convs, paths = [conv for conv, _ in feeds], [path for _, path in feeds]
    for conv, path in feeds:
        norm = folded.get_submodule(path)
        rest = _activation_of(norm)
        if rest is None or convs.count(conv) > 1 or paths.count(path) > 1:
            continue
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
        shift = shift * scale
        if norm.affine:
            shift = shift + norm.bias.double()
        dtype = conv.weight.dtype
        conv.weight = nn.Parameter((conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
        conv.bias = nn.Parameter(shift.to(dtype))
        folded.set_submodule(path, rest)
    return folded
