"""What stands in for the `forward` of a fused block, stem or head.

`fuse` sets it as an attribute of the block: `block.forward = FusedForward(...)`. Class, path, submodules, parameters
and `state_dict` of the block stay as they are, hooks on the block itself fire as before, and deleting the attribute is
all there is to undo.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import _C, training_forward
from .backends import UNCHECKED, get_backend, packed_block, packed_layer, training_refused, unchecked_gpu
from .fold import BlockTensors, Layer, Run, memo
from .functional import is_transformed, run_block, run_layer
from .reference import ACTIVATIONS
from .shortcut import UNPLANNED, Look, is_quiet, is_quiet_training, shortcut, training_shortcut, watch
from .training import is_pointwise

if TYPE_CHECKING:
    from .recognise import ConvNorm, LayerStructure, Structure

_logger = logging.getLogger("mbv2_kernels")
_PACK_CHAIN = torch.ops.mbv2.pack_chain.default
_RUN_CHAIN = torch.ops.mbv2.chain_packed.default

NO_FIT = "input does not fit the block"  # the original modules say so in their own words
TRAINING = "training: original modules"  # how every reason of that kind begins
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")
# Names of their tensors.
_OF_CONV = ("weight", "bias")
_OF_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class FusedForward:
    """Runs one block fused, or its original modules where the fused kernel would not compute the same.

    Each call decides anew, in a few microseconds, and remembers the reason in `last_reason` (None: fused).
    torch.compile and torch.export trace the decision like any Python: what it depends on becomes guards, and nothing is
    remembered.

    Picklable and copyable together with its block (it refers to the block and to its submodules).
    """

    def __init__(self, structure: Structure, path: str = "", memory: str = "fast") -> None:
        self.block = structure.block
        self.path = path
        self.memory = memory
        self.kind = structure.kind
        self.config: Any = structure.config
        self.layers: tuple[ConvNorm | None, ...] = structure.layers
        self.drops = structure.drops
        self.eval_only = structure.eval_only
        self.untrainable = structure.untrainable
        self.in_channels = structure.in_channels
        self.norms = tuple(layer.norm for layer in self.layers if layer is not None and layer.norm is not None)
        self.watched = tuple(_watched_modules(structure))
        self.batches_seen: list[int] = []
        self.warned: set[str] = set()
        self.last_reason: str | None = None
        self.last_run: Run | None = None
        self._watch: _C.Watch | None = None
        self._shortcut: _C.Shortcut | None = None
        self._epoch: object = None  # the memo's when the block last ran without one
        self._trained: list[int] = []  # the tensors with which it last did so in training
        self._step_dims: list[int] = []
        self._step_numbers: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        # Of the modules of one process; made anew when needed.
        return {**vars(self), "_watch": None, "_shortcut": None, "_epoch": None, "_trained": []}

    @property
    def __code__(self) -> Any:
        """Where a root module's forward is written: torch.export asks."""
        return type(self.block).forward.__code__

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tracing = torch.compiler.is_compiling()
        if not tracing and self._shortcut is not None and not args and not kwargs:
            y = self._shortcut(x)
            if y is not None:
                return y
        changed = tracing or self._looks_changed()
        reason = (self.refusal() if changed else None) or self._refused_input(x, args, kwargs)
        if reason is None:
            tensors = self.tensors()
            reason = _refused_weights(x, tensors.weights()[0])
        if (tracing or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
            reason = "ONNX export: original modules, ONNX has no such operator"
        if reason is None and changed and self._uses_batch_statistics():
            reason = self._refused_training(x)
            if reason is None:
                return self._train(x, tensors)
        if reason is None:
            return self._run(x, tensors) if tracing else self._run_eagerly(x, tensors)
        if not tracing:
            self.note_refusal(reason)
        return type(self.block).forward(self.block, x, *args, **kwargs)

    def _looks_changed(self) -> bool:
        """False: nothing stands against the kernel, as in eval mode when nothing was touched. True: look closer."""
        if self._watch is None:
            self._watch = watch(self._looks())
        return not self._watch.unchanged() or _has_any_global_hook()

    def _looks(self) -> Iterator[Look]:
        """What `refusal` asks for; stricter only where that costs a closer look."""
        evaluating = (("training", False),)
        yield from self._module_looks()
        for norm in self.norms:
            batch_statistics = hasattr(norm, "track_running_stats")
            settings = evaluating if batch_statistics else ()
            yield Look(norm, settings=settings, present=("running_mean", "running_var"))
        for drop in self.drops:
            yield Look(drop, settings=evaluating)
        if self.eval_only:
            yield Look(self.block, settings=evaluating)

    def _module_looks(self) -> Iterator[Look]:
        for module, children, settings in self.watched:
            yield Look(module, module is not self.block, None, children, settings)

    def training_looks(self) -> Iterator[Look]:
        """All that a step of training depends on, apart from its input and the values of its tensors."""
        yield from self._module_looks()
        for drop in self.drops:
            yield Look(drop, settings=(("training", False),))
        for layer in self.layers:
            if layer is None:
                continue
            conv, norm = layer
            yield Look(conv, moving=_places(conv, _OF_CONV))
            if norm is not None:
                names = [name for name in ("training", "eps", "momentum", "track_running_stats") if name in vars(norm)]
                settings = tuple((name, getattr(norm, name)) for name in names)
                yield Look(norm, settings=settings, moving=_places(norm, _OF_NORM))

    def step_looks(self) -> Iterator[Look]:
        """All that `step` depends on, apart from dtype, its tier and the memo."""
        yield from self._looks()
        for layer in self.layers:
            if layer is None:
                continue
            yield Look(layer.conv, tensors=_places(layer.conv, _OF_CONV))
            if layer.norm is not None:
                yield Look(layer.norm, settings=(("eps", layer.norm.eps),), tensors=_places(layer.norm, _OF_NORM))

    def refusal(self) -> str | None:
        """Why the original modules would run now, whatever the input; None if nothing stands against the kernel."""
        for norm in self.norms:
            if norm._buffers["running_mean"] is None or norm._buffers["running_var"] is None:
                return "a BatchNorm has lost its running statistics since fuse()"
        if self.untrainable and self._uses_batch_statistics():
            return f"{TRAINING} ({self.untrainable})"
        for drop in self.drops:
            if drop.training and _rate(drop) > 0:
                return f"{TRAINING} ({type(drop).__name__} is active)"
        if self.eval_only and self.block.training:
            return f"{TRAINING} (the forward of the block looks at its training flag)"
        if _has_any_global_hook():
            return "global module hooks would not fire inside the block"
        for module, children, settings in self.watched:
            if module is not self.block and (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return f"hooks on {type(module).__name__} inside the block would not fire"
            if module is not self.block and "forward" in module.__dict__:
                return f"the forward of {type(module).__name__} was replaced on the instance since fuse()"
            if children:
                now = module._modules
                if len(now) != len(children):
                    return (
                        f"submodules of {type(module).__name__} were added or removed since fuse(): call fuse() again"
                    )
                for name, child in children:
                    if now.get(name) is not child:
                        owner = type(module).__name__
                        return f"submodule {name!r} of {owner} was replaced since fuse(): call fuse() again"
            for name, value in settings:
                if getattr(module, name) != value:
                    return f"{name} of {type(module).__name__} was changed since fuse(): call fuse() again"
        return None

    def _refused_input(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args or kwargs:
            return "called with more than one argument"
        if not isinstance(x, Tensor):
            return f"called with a {type(x).__name__} (torch.fx tracing?), not a tensor"
        if x.dtype not in _DTYPES:
            return f"{x.dtype} is not computed by the kernels"
        if x.device.type not in _DEVICES:
            return f"no kernel for device type {x.device.type!r}"
        if x.layout is not torch.strided:
            return f"layout {x.layout} is not computed by the kernels"
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            return NO_FIT
        if x.is_cuda and get_backend() == "auto":
            return unchecked_gpu(x.device)
        return None

    def tensors(self) -> Any:
        """The parameters and statistics as they are now; each attribute is read once (it may be parametrized)."""
        expand, depthwise, project = self.layers
        return BlockTensors._make((*_layer_tensors(expand), *_layer_tensors(depthwise), *_layer_tensors(project)))

    def eps(self) -> Any:
        expand, depthwise, project = self.layers
        return _eps(expand), _eps(depthwise), _eps(project)

    def _uses_batch_statistics(self) -> bool:
        return any(map(training_forward.uses_batch_statistics, self.norms))

    def _refused_training(self, x: Tensor) -> str | None:
        reason = "torch.func and forward-mode derivatives need them" if is_transformed() else training_refused(x)
        return reason and f"{TRAINING} ({reason})"

    def _train(self, x: Tensor, tensors: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            memo.forget(tensors)  # the weights that eval mode keeps
            self.last_reason = None
        y = self._train_step(x, tensors)
        if not torch.compiler.is_compiling():
            self.last_run = memo.last_run(self._training_tensors(tensors))  # fully_shard's weights are gone afterwards
            self._plan_training(x, tensors)
        return y

    def _plan_training(self, x: Tensor, tensors: Any) -> None:
        """Makes steps on images like x short, if this one met the tensors of the one before."""
        before, self._trained = self._trained, [id(t) for t in tensors]
        if before != self._trained or UNPLANNED or x.shape[0] < training_forward.Again.LEAST_IMAGES:
            return
        if not is_quiet_training(x) or self._has_parametrized_weights():
            return
        if any(isinstance(norm, nn.SyncBatchNorm) for norm in self.norms):  # which may find its processes later
            return
        again = self._train_again(tensors)
        if again.usual:
            with contextlib.suppress(RuntimeError):  # tensors of a kind that cannot be watched
                self._shortcut = training_shortcut(again, watch(self.training_looks()), x)

    def _train_step(self, x: Tensor, tensors: Any) -> Tensor:
        return training_forward.train_block(x, self.layers, tensors, self.eps(), self.config, self.memory)

    def _train_again(self, tensors: Any) -> training_forward.Again:
        return training_forward.block_again(self.layers, tensors, self.eps(), self.config, self.memory)

    def _training_tensors(self, tensors: Any) -> Any:
        return training_forward.without_running_statistics(
            tensors, [training_forward.uses_batch_statistics(layer and layer.norm) for layer in self.layers]
        )

    def _run(self, x: Tensor, tensors: Any) -> Tensor:
        return run_block(x, tensors, self.eps(), self.config)

    def step(self, dtype: torch.dtype) -> tuple[Tensor, list[int]] | None:
        """Packed weights and numbers of this block as one step of the op `mbv2::pack_chain`, for images of `dtype`.

        None if it would not run fused on CPU images of its channels now, or has parametrized weights: then a call of
        its own tells (and notes) more.
        """
        if self._looks_changed() and (self.refusal() is not None or self._uses_batch_statistics()):
            return None
        if self._has_parametrized_weights():
            return None
        tensors = self.tensors()
        weight = tensors.weights()[0]
        if weight.dtype is not dtype or not weight.is_cpu:
            return None
        self._notice_training(tensors)
        packed, *dims = self._packed(tensors, dtype)
        if dims != self._step_dims:
            self._step_dims, self._step_numbers = dims, self._numbers(*dims)
        self.last_reason = None
        return packed, self._step_numbers

    def _packed(self, tensors: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        return packed_block(tensors, self.eps(), dtype)

    def _numbers(self, hidden_channels: int, out_channels: int, kernel_size: int, expand: bool) -> list[int]:
        stride, padding, dilation, activation, final_activation, residual = self.config
        shape = [hidden_channels, out_channels, kernel_size, int(expand), stride, padding, dilation]
        return [0, *shape, ACTIVATIONS.index(activation), ACTIVATIONS.index(final_activation), int(residual)]

    def _notice_training(self, tensors: Any) -> None:
        # BatchNorm in training mode updates its statistics without counting a version, its batch counter with one: so a
        # slice of the block that was trained past the block is noticed.
        counters = [norm._buffers.get("num_batches_tracked") for norm in self.norms]
        seen = [c._version for c in counters if c is not None and not c.is_inference()]
        if seen != self.batches_seen:
            memo.forget(tensors)
            self.batches_seen = seen

    def _run_eagerly(self, x: Tensor, tensors: Any) -> Tensor:
        self._notice_training(tensors)
        y = self._run(x, tensors)
        self.last_reason = None
        if self._has_parametrized_weights():
            self.last_run = memo.last_run(tensors)
        elif is_quiet(x):
            self._plan(x.dtype)
        return y

    def _plan(self, dtype: torch.dtype) -> None:
        """Makes calls on images of `dtype` short, if the last one found all as the one before."""
        epoch, self._epoch = self._epoch, memo.epoch
        if epoch is not memo.epoch or UNPLANNED:
            return
        try:
            before = watch(self.step_looks())
        except RuntimeError:  # tensors made in inference mode have no version
            return
        step = self.step(dtype)
        if step is not None:
            packed, numbers = step
            chain = _PACK_CHAIN([packed], numbers)
            self._shortcut = shortcut(_RUN_CHAIN, (chain,), before, epoch, dtype, channels=self.in_channels)

    def _has_parametrized_weights(self) -> bool:
        """Such weights are new tensors whenever they are read, and reading may have effects (spectral norm)."""
        return any("weight" not in layer.conv._parameters for layer in self.layers if layer is not None)

    def what_ran(self) -> Run | None:
        """The last fused run, of compiled code too; None if there was none."""
        if self._has_parametrized_weights():
            return self.last_run
        tensors = self.tensors()
        return memo.last_run(tensors) or memo.last_run(self._training_tensors(tensors)) or self.last_run

    def note_refusal(self, reason: str) -> None:
        """Remembers why the original modules run, and warns, once for each reason."""
        if self.last_reason is None:
            memo.epoch = object()  # what is planned and runs it fused has to say so anew
        self.last_reason = reason
        if reason.startswith(TRAINING):
            if not self._has_parametrized_weights() and not is_transformed():
                memo.forget(self.tensors())  # see _run_eagerly; this one also serves compiled code that runs later
        elif reason not in self.warned and reason != NO_FIT and not reason.startswith(UNCHECKED):
            self.warned.add(reason)
            _logger.warning("block %r runs its original modules: %s", self.path, reason)


class FusedLayer(FusedForward):
    """The same for a dense convolution with its norm and activation: one layer, and kernels for CPUs only."""

    def __init__(self, structure: LayerStructure, path: str = "") -> None:
        super().__init__(structure, path)
        self.layer = structure.layer

    def _refused_input(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        reason = super()._refused_input(x, args, kwargs)
        if reason is None and not x.is_cpu:
            return f"no kernel for dense convolutions on device type {x.device.type!r}"
        return reason

    def _refused_training(self, x: Tensor) -> str | None:
        if self.kind == "head" and not is_pointwise(self.layer.conv.weight, self.config):
            return f"{TRAINING} (a 1x1 convolution with stride or padding)"
        return super()._refused_training(x)

    def _train_step(self, x: Tensor, tensors: Layer) -> Tensor:
        return training_forward.train_layer(x, self.layer, tensors, self.eps(), self.config)

    def _train_again(self, tensors: Layer) -> training_forward.Again:
        return training_forward.layer_again(self.layer, tensors, self.eps(), self.config)

    def tensors(self) -> Layer:
        return Layer._make(_layer_tensors(self.layer))

    def eps(self) -> float:
        return _eps(self.layer)

    def _run(self, x: Tensor, tensors: Layer) -> Tensor:
        return run_layer(x, tensors, self.eps(), self.config)

    def _packed(self, tensors: Layer, dtype: torch.dtype) -> tuple[Any, ...]:
        return packed_layer(tensors, self.eps(), dtype)

    def _numbers(self, out_channels: int, kernel_size: int) -> list[int]:  # type: ignore[override]
        stride, padding, activation = self.config
        return [1, 0, out_channels, kernel_size, 0, stride, padding, 1, ACTIVATIONS.index(activation), 0, 0]


class FusedPair(FusedLayer):
    """The same for a convolution and a norm that a network's own method calls one after the other.

    It belongs to a Sequential of the two, which is no part of the network and is called in their place.
    """

    def __init__(self, structure: LayerStructure, path: str = "") -> None:
        super().__init__(structure, path)
        assert structure.composition is not None
        self.composition = structure.composition

    def refusal(self) -> str | None:
        return self.composition.overridden() or super().refusal()


def _layer_tensors(layer: ConvNorm | None) -> tuple[Tensor | None, ...]:
    """Six of the block's tensors, past nn.Module's slow attribute lookup where they are ordinary parameters."""
    if layer is None:
        return (None,) * 6
    conv, norm = layer
    own = conv._parameters  # not `own.get(name, conv.name)`: that would compute a parametrized weight for nothing
    weight = own["weight"] if "weight" in own else conv.weight  # noqa: SIM401
    bias = own["bias"] if "bias" in own else conv.bias  # noqa: SIM401
    if norm is None:
        return weight, bias, None, None, None, None
    own, statistics = norm._parameters, norm._buffers
    gamma = own["weight"] if "weight" in own else norm.weight  # noqa: SIM401
    beta = own["bias"] if "bias" in own else norm.bias  # noqa: SIM401
    return weight, bias, gamma, beta, statistics["running_mean"], statistics["running_var"]  # type: ignore[return-value]


def _places(module: nn.Module, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Where a module keeps its tensors of these names, as `Look.tensors`."""
    stores = ("_parameters", "_buffers")
    return tuple((store, name) for name in names for store in stores if name in getattr(module, store))


def _eps(layer: ConvNorm | None) -> float:
    return 0.0 if layer is None or layer.norm is None else layer.norm.eps  # type: ignore[return-value]


def _rate(drop: nn.Module) -> float:
    """The rate of a Dropout, StochasticDepth, DropPath; 1 where it is called something else."""
    return getattr(drop, "p", getattr(drop, "drop_prob", 1.0)) or 0.0


def _refused_weights(x: Tensor, weight: Tensor) -> str | None:
    if x.device != weight.device:
        return NO_FIT
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return NO_FIT
    return None


class _Watched(NamedTuple):
    """What one module of a block must still be like, as seen when the block was recognised."""

    module: nn.Module
    children: tuple[tuple[str, nn.Module | None], ...]
    settings: tuple[tuple[str, Any], ...]


def _watched_modules(structure: Structure) -> Iterator[_Watched]:
    """The block first, then all its submodules, apart from parametrizations: those run as ever.

    Settings are what the recognised computation depends on and could be edited: the geometry of convolutions; of other
    modules their plain numbers, flags and names, since those (`use_res_connect`, `has_skip`, `min_val`) may decide what
    a forward does. Of norms none: eps is read anew by every call.
    """
    convs = {layer.conv for layer in structure.layers if layer is not None}
    norms = {layer.norm for layer in structure.layers if layer is not None}
    parametrizations = {module for conv in convs for module in list(conv.modules())[1:]}
    for module in structure.block.modules():
        if module in parametrizations:
            continue
        names: Iterable[str] = ()
        if module is structure.window:
            names = ("stride", "padding", "dilation", "padding_mode")
        elif module in convs:
            names = ("stride", "padding")
        elif module not in norms and module not in structure.drops:
            names = [name for name, value in vars(module).items() if _is_plain(name, value)]
        children = () if module in convs else tuple(module._modules.items())
        yield _Watched(module, children, tuple((name, getattr(module, name)) for name in names))


def _is_plain(name: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and name not in ("training", "inplace")
