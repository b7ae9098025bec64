"""BatchNorm folding, and the memo that keeps folded and packed weights until a parameter or buffer changes.

An inverted residual block in eval mode is a pure function of its input and of up to 18 tensors (`BlockTensors`), a
convolution with its BatchNorm of up to six (`Layer`). What is derived from those alone, the folded weights and from
them the packed ones, is memoised here, in one process-wide `memo`. Eager calls and the ops `mbv2::inverted_residual_bn`
and `mbv2::conv_bn_act` (so torch.compile and torch.export too) look it up at run time, which is where staleness is
noticed.

When a memoised value is used again: every tensor has the same memory, the same version counter, the same strides, and
eps is the same. So an optimizer step, `load_state_dict`, an in-place edit, `.to()` or a replaced parameter are noticed.
Two writes are invisible, because they bypass the version counter:

- edits through `.data` (`p.data.mul_(2)`), which bypass autograd's own checks in the same way;
- BatchNorm in training mode, which updates its running statistics without counting a version (it saves them for
  backward). Whoever runs a block's BatchNorms in training mode calls `memo.forget(tensors)`.

`memo.clear()` drops everything; `fuse` calls it, so `fuse(model)` again is the way out after edits through `.data`.

A CUDA graph knows nothing of all this: it replays with the weights of its capture, which `memo.keep` keeps alive as
long as the block's own tensors live. After a change of the weights it has to be captured again.
"""

from __future__ import annotations

import concurrent.futures
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_logger = logging.getLogger("mbv2_kernels")


class Layer(NamedTuple):
    """A convolution without padding rules of its own, and its BatchNorm: `mean` and `var` None if there is none."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None

    def weights(self) -> tuple[Tensor, ...]:
        """The convolution's weight."""
        return (self.weight,)

    def folded(self, eps: float) -> tuple[Tensor, Tensor | None]:
        """`fold_layer`."""
        return fold_layer(self, eps)


class BlockTensors(NamedTuple):
    """The tensors of one block, in the order of the op `mbv2::inverted_residual_bn`.

    Three convolutions with their BatchNorms: expand (1x1), depthwise (k x k), project (1x1). `weight` and `bias` are
    the convolution's, `gamma` and `beta` the BatchNorm's weight and bias, `mean` and `var` its running statistics.
    No expand layer: `expand_weight` is None. No BatchNorm: `mean` and `var` are None. Not affine: `gamma`, `beta` None.
    """

    expand_weight: Tensor | None
    expand_bias: Tensor | None
    expand_gamma: Tensor | None
    expand_beta: Tensor | None
    expand_mean: Tensor | None
    expand_var: Tensor | None
    depthwise_weight: Tensor
    depthwise_bias: Tensor | None
    depthwise_gamma: Tensor | None
    depthwise_beta: Tensor | None
    depthwise_mean: Tensor | None
    depthwise_var: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    project_gamma: Tensor | None
    project_beta: Tensor | None
    project_mean: Tensor | None
    project_var: Tensor | None

    @classmethod
    def from_folded(cls, weights: FoldedWeights) -> BlockTensors:
        """A block whose BatchNorms are folded already."""
        w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project = weights
        no_bn = (None, None, None, None)
        return cls(w_expand, b_expand, *no_bn, w_depthwise, b_depthwise, *no_bn, w_project, b_project, *no_bn)

    def layers(self) -> tuple[Layer | None, Layer, Layer]:
        """Expand (None without one), depthwise, project."""
        expand = None if self.expand_weight is None else Layer(self.expand_weight, *self[1:6])
        return expand, Layer(*self[6:12]), Layer(*self[12:18])

    def weights(self) -> tuple[Tensor, ...]:
        """The convolutions' weights."""
        present = (self.expand_weight, self.depthwise_weight, self.project_weight)
        return tuple(weight for weight in present if weight is not None)

    def folded(self, eps: Eps) -> FoldedWeights:
        """`fold`."""
        return fold(self, eps)


class FoldedWeights(NamedTuple):
    """The six weights of the functional form, in torch's convolution shapes."""

    w_expand: Tensor | None
    b_expand: Tensor | None
    w_depthwise: Tensor
    b_depthwise: Tensor | None
    w_project: Tensor
    b_project: Tensor | None


Eps = tuple[float, float, float]

#: What `memo` keeps values for. The eps that goes with a Layer is one float, with a block three.
Tensors = BlockTensors | Layer

#: For blocks without BatchNorm.
NO_EPS: Eps = (0.0, 0.0, 0.0)


def fold(tensors: BlockTensors, eps: Eps) -> FoldedWeights:
    """Folds each BatchNorm's running statistics into its convolution.

    Returns float32 weights (float64 for float64 parameters), whatever the parameters' dtype. Plain differentiable
    operations: gradients flow to every parameter. Raises ValueError for shapes or combinations that make no block.
    """
    check_shapes(tensors)
    expand, depthwise, project = tensors.layers()
    w_expand, b_expand = (None, None) if expand is None else fold_layer(expand, eps[0])
    return FoldedWeights(w_expand, b_expand, *fold_layer(depthwise, eps[1]), *fold_layer(project, eps[2]))


def fold_layer(layer: Layer, eps: float) -> tuple[Tensor, Tensor | None]:
    """Folded weight [O, I, k, k] and bias [O], which is None without a BatchNorm and a bias."""
    weight, bias, gamma, beta, mean, var = layer
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if mean is None or var is None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    scale = bn_scale(gamma, var, eps)
    shift = -mean if bias is None else bias.double() - mean
    shift = shift * scale if beta is None else beta + shift * scale
    return weight.to(dtype) * scale.to(dtype)[:, None, None, None], shift.to(dtype)


def fold_layer_backward(
    grad_weight: Any, grad_bias: Any, layer: Layer, eps: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """`fold_layer` backwards: from the folded weight's and bias' gradients to those of weight, bias, gamma and beta.

    None where `needs` is False. A gradient that nothing needs may come as an empty tensor or None: it is not touched.
    """
    weight, bias, gamma, beta, mean, var = layer
    need_weight, need_bias, need_gamma, need_beta = needs
    grads: list[Tensor | None] = [None] * 4
    scale = None if mean is None or var is None else bn_scale(gamma, var, eps)
    if need_weight:
        grads[0] = grad_weight if scale is None else grad_weight * scale.to(grad_weight.dtype)[:, None, None, None]
    if need_bias:
        grads[1] = grad_bias if scale is None else grad_bias * scale
    if need_gamma:
        assert mean is not None and var is not None
        shift = -mean if bias is None else bias.double() - mean
        summed = (grad_weight.double() * weight).sum((1, 2, 3)) + grad_bias * shift
        grads[2] = summed * bn_scale(None, var, eps)
    if need_beta:
        grads[3] = grad_bias
    leaves = (weight, bias, gamma, beta)
    return [None if g is None or t is None else gradient_like(t, g) for g, t in zip(grads, leaves, strict=True)]


def gradient_like(leaf: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the shape, dtype and strides of `leaf`, in dimensions of size 1 too: a 1x1 weight in channels_last
    has others than a contiguous one, and DistributedDataParallel warns about gradients that do not match."""
    if gradient.shape != leaf.shape:
        gradient = gradient.view(leaf.shape)
    if gradient.dtype == leaf.dtype and gradient.stride() == leaf.stride():
        return gradient
    if gradient.dtype == leaf.dtype and gradient.is_contiguous() and leaf.is_contiguous():
        return gradient.as_strided(leaf.shape, leaf.stride())  # the same numbers at the same places
    return torch.empty_like(leaf).copy_(gradient)


def bn_scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """gamma / sqrt(var + eps), [channels]. In float64: a vector costs nothing, and the weights then round once."""
    scale = (var.double() + eps).rsqrt()
    return scale if gamma is None else gamma * scale


def check_shapes(tensors: BlockTensors, names: tuple[str, ...] = BlockTensors._fields) -> None:
    """Raises ValueError or TypeError, naming the argument, unless the 18 fit together."""
    depthwise, project = tensors.depthwise_weight, tensors.project_weight
    if depthwise.dim() != 4 or depthwise.shape[1] != 1:
        raise ValueError(f"{names[6]} must be [C, 1, k, k], got {list(depthwise.shape)}")
    if depthwise.shape[2] != depthwise.shape[3] or depthwise.shape[2] % 2 == 0:
        raise ValueError(f"{names[6]} must have a square kernel of odd size, got {list(depthwise.shape)}")
    hidden = depthwise.shape[0]
    channels = f"as {names[6]} has {hidden} channels"
    if project.dim() != 4 or tuple(project.shape[1:]) != (hidden, 1, 1):
        raise ValueError(f"{names[12]} must be [Cout, {hidden}, 1, 1], {channels}, got {list(project.shape)}")
    expand = tensors.expand_weight
    if expand is not None and (expand.dim() != 4 or expand.shape[0] != hidden or tuple(expand.shape[2:]) != (1, 1)):
        raise ValueError(f"{names[0]} must be [{hidden}, Cin, 1, 1], {channels}, got {list(expand.shape)}")
    for first, size in ((0, hidden), (6, hidden), (12, project.shape[0])):
        weight, *vectors = tensors[first : first + 6]
        for name, vector in zip(names[first + 1 : first + 6], vectors, strict=True):
            if vector is None:
                continue
            if weight is None:
                raise ValueError(f"{name} is given, but {names[first]} is None")
            if tuple(vector.shape) != (size,):
                raise ValueError(f"{name} must be [{size}], got {list(vector.shape)}")
            if vector.device != depthwise.device:
                raise ValueError(f"{name} must be on {depthwise.device} like {names[6]}, got {vector.device}")
        if weight is not None and weight.device != depthwise.device:
            raise ValueError(f"{names[first]} must be on {depthwise.device} like {names[6]}, got {weight.device}")
        if weight is not None and weight.dtype != depthwise.dtype:
            raise TypeError(f"{names[first]} must be {depthwise.dtype} like {names[6]}, got {weight.dtype}")
        _, gamma, beta, mean, var = vectors
        if (mean is None) != (var is None) or (mean is None and (gamma is not None or beta is not None)):
            raise ValueError(
                f"{names[first + 4]} and {names[first + 5]} are needed to fold a BatchNorm: both or neither"
            )


class Run(NamedTuple):
    """What ran a block: the key under which the memo keeps its weights, and what `summary` shows."""

    backend: str
    tier: str | None = None  # of the CPU kernels, or which of the two Triton kernels
    dtype: torch.dtype | None = None  # of the kept weights, where that depends on the input
    reason: str = ""  # why this tier, where there was a choice


_Watch = list[weakref.ref[torch.UntypedStorage]]


class _Record:
    """What is kept for one block or layer: valid while `stamp` matches, one value for each `Run` seen."""

    __slots__ = ("last_run", "stamp", "storages", "values")

    def __init__(self, stamp: tuple[Any, ...] | None, storages: _Watch) -> None:
        self.stamp = stamp
        self.storages = storages
        self.values: dict[Run, Any] = {}
        self.last_run: Run | None = None


class Memo:
    """Values derived from a block's (or layer's) tensors, kept as long as all their storages live and none has changed.

    Keyed by the tensors' addresses. An address proves nothing once its storage is gone, so every record holds weak
    references to the storages and is removed when the first of them dies: what is found here is always made from
    memory that has been alive since, and whose version counters are compared.

    Lookups take no lock (dict operations are atomic); building does, so that threads share one packing.

    epoch: a new object whenever a record is dropped or something else than before ran a block. While it is the same
    and the tensors are unchanged, all that was got here would be the same again, and `last_run` is.
    """

    def __init__(self) -> None:
        self.epoch = object()
        self._records: dict[tuple[int, ...], _Record] = {}
        self._captured: dict[tuple[int, ...], tuple[_Watch, list[Any]]] = {}
        self._lock = threading.RLock()  # a torch dispatch mode may run a block while one is built
        self._warned_inference = False

    def __len__(self) -> int:
        return len(self._records)

    def get(self, tensors: Tensors, eps: Any, run: Run, build: Callable[[Any], Any]) -> Any:
        """`build(tensors.folded(eps))`, made once for each `run` until a tensor changes."""
        present = [t for t in tensors if t is not None]
        key = tuple(map(_address_of, present))
        record = self._records.get(key)
        if record is not None:
            try:
                if record.stamp == _stamp(present, tensors, eps):
                    value = record.values[run]
                    self._ran(record, run)
                    return value
            except (KeyError, RuntimeError):  # not built for this run yet; inference tensors have no version
                pass
        return self._miss(key, present, tensors, eps, run, build)

    def note(self, tensors: Tensors, run: Run) -> None:
        """Records that `run` ran the block, without keeping anything."""
        present = [t for t in tensors if t is not None]
        key = tuple(map(_address_of, present))
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(None, self._watch(key, present, self._records))
        self._ran(record, run)

    def keep(self, tensors: Tensors, value: Any) -> None:
        """Keeps `value` as long as the tensors' memory lives, even if they change: a graph being captured reads it.

        Only if it is the memo's own. What was built during the capture belongs to the graph.
        """
        present = [t for t in tensors if t is not None]
        key = tuple(map(_address_of, present))
        with self._lock:
            record = self._records.get(key)
            if record is None or all(value is not own for own in record.values.values()):
                return
            if key not in self._captured:
                self._captured[key] = (self._watch(key, present, self._captured), [])
            values = self._captured[key][1]
            if all(value is not kept for kept in values):
                values.append(value)

    def last_run(self, tensors: Tensors) -> Run | None:
        """What last ran the block of these tensors; None if nothing has, since they changed place."""
        record = self._records.get(_key(tensors))
        return None if record is None else record.last_run

    def forget(self, tensors: Tensors) -> None:
        """Drops what is kept for these tensors: call it when they change in a way no version counter shows."""
        self._records.pop(_key(tensors), None)
        self.epoch = object()

    def clear(self) -> None:
        """Drops everything but what CUDA graphs use."""
        self._records.clear()
        self.epoch = object()

    def _ran(self, record: _Record, run: Run) -> None:
        if record.last_run != run:
            record.last_run = run
            self.epoch = object()

    def _miss(
        self,
        key: tuple[int, ...],
        present: list[Tensor],
        tensors: Tensors,
        eps: Any,
        run: Run,
        build: Callable[[Any], Any],
    ) -> Any:
        with self._lock:
            try:
                stamp = _stamp(present, tensors, eps)  # before folding: the next call notices what changes meanwhile
            except RuntimeError:
                return self._build_untracked(tensors, eps, run, build)
            record = self._records.get(key)
            if record is None or record.stamp != stamp:
                record = _Record(stamp, self._watch(key, present, self._records))
            elif run in record.values:  # another thread was faster
                return record.values[run]
            if not present[0].is_cuda:
                value = _build(tensors, eps, build)
            elif torch.cuda.is_current_stream_capturing():
                self.note(tensors, run)
                return _build(tensors, eps, build)  # in the graph's memory, and anew in each of its replays
            else:
                value = _build_outside_graphs(tensors, eps, build)
            record.values[run] = value
            self._ran(record, run)
            self._records[key] = record
            return value

    def _build_untracked(self, tensors: Tensors, eps: Any, run: Run, build: Callable[[Any], Any]) -> Any:
        """For inference tensors: without a version counter there is nothing to tell that a kept value is stale."""
        if not self._warned_inference:
            self._warned_inference = True
            _logger.warning(
                "a fused block or layer has parameters made in torch.inference_mode(): they carry no version counter, "
                "so its weights are folded and packed in every call; make or load the model outside inference_mode"
            )
        self.note(tensors, run)
        return _build(tensors, eps, build)

    def _watch(self, key: tuple[int, ...], present: list[Tensor], records: dict[tuple[int, ...], Any]) -> _Watch:
        """Weak references to the storages, that remove what `records` has under `key` when one of them dies.

        Whatever record stands there then is made from memory that is gone. torch keeps a storage's Python object as
        long as the storage lives, so the reference follows the memory and not the Python object.
        """

        def remove(_: object) -> None:
            records.pop(key, None)
            self.epoch = object()

        return [weakref.ref(t.untyped_storage(), remove) for t in present]


def _build(tensors: Tensors, eps: Any, build: Callable[[Any], Any]) -> Any:
    with torch.no_grad():
        return build(tensors.folded(eps))


def _build_outside_graphs(tensors: Tensors, eps: Any, build: Callable[[Any], Any]) -> Any:
    """`_build` on a GPU, finished when it returns (other streams will read it), in torch's ordinary memory.

    In a thread of its own: torch.compile's CUDA graphs warm up with the memory of the calling thread coming from the
    graph's pool, and refuse a model that keeps some of it.
    """
    device = tensors.weights()[0].device
    stream = torch.cuda.current_stream(device)

    def in_thread() -> Any:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            value = _build(tensors, eps, build)
            stream.synchronize()
            return value

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(in_thread).result()


# The lookup runs in every call of every block: map() over these is the fastest way through some fifteen tensors.
_address_of = torch.Tensor.data_ptr
_version_of = operator.attrgetter("_version")


def _key(tensors: Tensors) -> tuple[int, ...]:
    return tuple(map(_address_of, [t for t in tensors if t is not None]))


def _stamp(present: list[Tensor], tensors: Tensors, eps: Any) -> tuple[Any, ...]:
    """What changes when a tensor is edited in place or viewed differently. RuntimeError for inference tensors."""
    return eps, [(weight.shape, weight.stride()) for weight in tensors.weights()], list(map(_version_of, present))


#: The process-wide memo.
memo = Memo()
