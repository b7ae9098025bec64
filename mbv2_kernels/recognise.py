"""Finds the blocks of a model that the fused kernel computes exactly, by structure.

Every depthwise convolution of a model is one candidate: the module to swap is one of its ancestors, the layers around
it decide whether the kernel computes that module, and `probe.confirm` runs the module once to make sure. Class names
never matter, so a network nobody has seen before works as long as its modules say

    [1x1 conv, norm, act]  depthwise conv, norm, act  1x1 conv, norm, [act]      (+ x)

in whatever wrappers. Around the blocks stand dense layers, a convolution with its norm and activation in a module of
its own, and these are taken by their form, not by their place:

    stem    k x k convolution of a picture (at most 4 channels)
    head    1x1 convolution, wherever it is no part of a block

Only in networks with a depthwise convolution somewhere, others are not what this package is for; or where the model is
one such layer and nothing else. Where convolution and norm are attributes of the network itself, the network's own
method may say that it calls one after the other (`composition`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from . import probe
from .chain import FusedFeatures
from .composition import METHOD, Composition, Refused
from .composition import read as read_composition
from .functional import BlockConfig, LayerConfig

KERNEL_SIZES = (3, 5, 7)  # what networks use; larger ones (ConvNeXt) are other blocks with other norms
STRIDES = (1, 2)
PICTURE_CHANNELS = 4  # at most, of what a stem takes
LAYER_KINDS = ("stem", "head")


class ConvNorm(NamedTuple):
    """A convolution and the BatchNorm that follows it, or None where nothing is to be folded."""

    conv: nn.Conv2d
    norm: nn.Module | None


@dataclass(frozen=True)
class BlockStructure:
    """Where the layers of one block are, and what the block computes with them."""

    block: nn.Module
    expand: ConvNorm | None
    depthwise: ConvNorm
    project: ConvNorm
    drops: tuple[nn.Module, ...]  # modules that are the identity in eval mode only (Dropout, DropPath)
    config: BlockConfig
    eval_only: bool = False  # the block's own forward looks at block.training (functional dropout)
    untrainable: str = ""  # why its norms in training mode are not what BatchNorm computes; "" if they are

    @property
    def layers(self) -> tuple[ConvNorm | None, ConvNorm, ConvNorm]:
        return self.expand, self.depthwise, self.project

    @property
    def window(self) -> nn.Conv2d:
        """The convolution that stride, padding and dilation belong to."""
        return self.depthwise.conv

    @property
    def in_channels(self) -> int:
        return (self.expand or self.depthwise).conv.in_channels

    @property
    def kind(self) -> str:
        return "depthwise_separable" if self.expand is None else "inverted_residual"


@dataclass(frozen=True)
class LayerStructure:
    """A dense convolution with its norm and activation, alone in a module or called in a row: stem or head."""

    block: nn.Module
    layer: ConvNorm
    drops: tuple[nn.Module, ...]
    config: LayerConfig
    eval_only: bool = False
    untrainable: str = ""
    composition: Composition | None = None  # what calls the two: `block` is then a Sequential of our own

    @property
    def layers(self) -> tuple[ConvNorm]:
        return (self.layer,)

    @property
    def window(self) -> nn.Conv2d:
        return self.layer.conv

    @property
    def in_channels(self) -> int:
        return self.layer.conv.in_channels

    @property
    def kind(self) -> str:
        return _layer_kind(self.layer.conv)


Structure = BlockStructure | LayerStructure


@dataclass(frozen=True)
class Candidate:
    """A module that looks like a block, a stem or a head: `structure` if it can be fused, else `reason`."""

    path: str
    module: nn.Module
    kind: str
    structure: Structure | None
    reason: str


def candidates(model: nn.Module, *, ignore: Collection[nn.Module] = ()) -> list[Candidate]:
    """All candidates of `model` in the order of `model.named_modules()`.

    Nothing is changed, on the model or on the global random state; fusable blocks are run once on small inputs, as
    fp64 copies on the CPU. Convolutions in `ignore` are passed over.
    """
    graph, ignored = _Graph(model), frozenset(map(id, ignore))
    found = {c.module: c for c in _find_blocks(graph, ignored)}
    found.update({c.module: c for c in _find_layers(graph, ignored, list(found))})
    order = {module: index for index, module in enumerate(graph.paths)}
    return sorted(found.values(), key=lambda c: order[c.module])


class _Graph:
    """The modules of a model with what nn.Module does not keep: paths and parents (a shared module has several)."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
        self.parents: dict[nn.Module, list[nn.Module]] = {module: [] for module in self.paths}
        for module in self.paths:
            for child in module._modules.values():
                if child is not None:
                    self.parents[child].append(module)
        self.size: dict[nn.Module, int] = {}  # how many modules it holds, itself included
        self.depthwise: dict[nn.Module, int] = {}  # how many of those are depthwise convolutions
        self.weighted: dict[nn.Module, int] = {}  # how many are convolutions or linear layers
        for module in self.paths:
            inside = list(module.modules())
            self.size[module] = len(inside)
            self.depthwise[module] = sum(map(_is_depthwise, inside))
            self.weighted[module] = sum(isinstance(m, _WEIGHTED) for m in inside)

    def ancestors(self, module: nn.Module) -> list[nn.Module]:
        """All modules that contain `module`, the innermost first."""
        seen: dict[nn.Module, None] = {}
        todo = list(self.parents[module])
        while todo:
            parent = todo.pop()
            if parent not in seen:
                seen[parent] = None
                todo.extend(self.parents[parent])
        return sorted(seen, key=self.size.__getitem__)


_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _is_callable(module: nn.Module) -> bool:
    """False for ModuleList, ModuleDict and the bare modules of a torch.fx graph: nobody calls them."""
    return type(module).forward is not nn.Module.forward


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and tuple(module.kernel_size) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# inverted residual and depthwise separable blocks
# ---------------------------------------------------------------------------------------------------------------------


def _find_blocks(graph: _Graph, ignore: frozenset[int]) -> Iterator[Candidate]:
    for module in graph.paths:
        if _is_depthwise(module) and id(module) not in ignore:
            assert isinstance(module, nn.Conv2d)
            yield _block_around(graph, module)


def _block_around(graph: _Graph, depthwise: nn.Conv2d) -> Candidate:
    """The candidate that stands for this depthwise convolution."""
    ancestors = [a for a in graph.ancestors(depthwise) if _is_callable(a)]
    own = [a for a in ancestors if graph.depthwise[a] == 1]
    # The innermost module with a forward of its own; else the innermost Sequential (MobileNetV1 in the wild, or inside
    # a block whose own forward does more).
    own.sort(key=_is_container)

    refusals: dict[nn.Module, str] = {}
    for block in own:
        try:
            structure = probe.confirm(_read_block(block, depthwise))
        except Refused as refused:
            refusals[block] = str(refused)
            continue
        assert isinstance(structure, BlockStructure)
        structure = _with_residual_around(own, structure)
        return _candidate(graph, structure.block, depthwise, structure=structure)

    for block in own:  # refused: report the first module that holds more than the depthwise layer itself
        if any(isinstance(m, (nn.Conv2d, nn.Linear)) and m is not depthwise for m in block.modules()):
            return _candidate(graph, block, depthwise, reason=refusals[block])
    return _no_module_of_its_own(graph, depthwise, ancestors)


def _with_residual_around(own: list[nn.Module], structure: BlockStructure) -> BlockStructure:
    """The parent that only adds x to this block (`x + self.fn(x)`), where there is one."""
    if structure.config.residual:
        return structure
    for parent in own:
        if _is_container(parent) or structure.block not in list(parent.modules())[1:]:
            continue
        try:
            around = probe.confirm(_read_block(parent, structure.depthwise.conv))
        except Refused:
            continue
        if isinstance(around, BlockStructure) and around.config.residual:
            return around
    return structure


def _no_module_of_its_own(graph: _Graph, depthwise: nn.Conv2d, ancestors: list[nn.Module]) -> Candidate:
    around = next((a for a in ancestors if graph.depthwise[a] > 1), None)
    if around is None:
        return _candidate(graph, depthwise, depthwise, reason="no 1x1 convolution stands beside it")
    inside = [graph.paths[m] for m in around.modules() if _is_depthwise(m)]
    if not _is_container(around) and around is not ancestors[-1]:
        reason = f"it holds {len(inside)} depthwise convolutions ({', '.join(inside)})"
        return _candidate(graph, around, depthwise, reason=reason)
    where = f"{type(around).__name__} {graph.paths[around]!r}"
    others = f"{len(inside) - 1} other depthwise convolutions"
    reason = f"no module of its own to swap: {where} holds it together with {others}"
    return _candidate(graph, depthwise, depthwise, reason=reason)


def _candidate(
    graph: _Graph, module: nn.Module, depthwise: nn.Conv2d, *, structure: BlockStructure | None = None, reason: str = ""
) -> Candidate:
    if structure is not None:
        return Candidate(graph.paths[module], module, structure.kind, structure, "")
    before = list(module.modules())
    before = before[: before.index(depthwise)]
    expanded = any(_is_pointwise(m) and m.out_channels == depthwise.in_channels for m in before)
    kind = "inverted_residual" if expanded else "depthwise_separable"
    return Candidate(graph.paths[module], module, kind, None, reason)


def _read_block(block: nn.Module, depthwise: nn.Conv2d) -> BlockStructure:
    """The layers of `block` as its modules show them; raises Refused with what does not fit.

    What modules cannot show (the residual, functional activations, padding done in forward) is a first guess here and
    decided by `probe.confirm`.
    """
    if not probe.is_plain_forward(block):
        raise Refused("its forward was replaced on the instance by other code")
    _refuse_extra_branches(block, depthwise)
    convs, norms, acts, drops = _inventory(block)
    at = convs.index(depthwise)
    if at > 1:
        raise Refused(f"{at} convolutions before the depthwise one, expected at most one 1x1")
    if len(convs) - at != 2:
        raise Refused(f"{len(convs) - at - 1} convolutions after the depthwise one, expected one 1x1")
    if depthwise.out_channels != depthwise.in_channels:
        multiplier = depthwise.out_channels // depthwise.in_channels
        raise Refused(f"depthwise convolution with channel multiplier {multiplier}")
    padding = _declared_padding("depthwise", depthwise, KERNEL_SIZES)
    expand, project = (convs[0] if at else None), convs[-1]
    for role, conv in (("expand", expand), ("project", project)):
        if conv is not None:
            _check_pointwise(role, conv)
    if expand is not None and expand.out_channels != depthwise.in_channels:
        raise Refused(f"expand gives {expand.out_channels} channels, depthwise takes {depthwise.in_channels}")
    if project.in_channels != depthwise.out_channels:
        raise Refused(f"depthwise gives {depthwise.out_channels} channels, project takes {project.in_channels}")

    after = _norm_of_each(convs, norms)
    hidden = {does: name for seen, does, name in acts if 0 < seen < len(convs)}
    if len(hidden) > 1:
        raise Refused(f"different activations inside the block ({', '.join(sorted(hidden.values()))})")
    final = [does for seen, does, _ in acts if seen == len(convs)]
    stride = int(depthwise.stride[0])
    in_channels = convs[0].in_channels
    config = BlockConfig(
        stride=stride,
        padding=padding,
        dilation=int(depthwise.dilation[0]),
        activation=next(iter(hidden), "none"),
        final_activation=final[0] if final else "none",
        residual=stride == 1 and in_channels == project.out_channels and not final,
    )
    return BlockStructure(
        block=block,
        expand=ConvNorm(expand, after[0]) if expand is not None else None,
        depthwise=ConvNorm(depthwise, after[at]),
        project=ConvNorm(project, after[-1]),
        drops=tuple(drops),
        config=config,
    )


class _Inventory(NamedTuple):
    """What a module holds, in registration order. Norms and activations: how many convolutions come before."""

    convs: list[nn.Conv2d]
    norms: list[tuple[int, nn.Module]]
    acts: list[tuple[int, str, str]]  # what it computes, its class
    drops: list[nn.Module]


def _inventory(block: nn.Module) -> _Inventory:
    """All layers of `block`; raises Refused with the first that the kernels do not compute."""
    convs, norms, acts, drops = found = _Inventory([], [], [], [])
    for path, module in _layers(block):
        if isinstance(module, nn.Conv2d):
            convs.append(module)
        elif _is_norm(module):
            norms.append((len(convs), module))
        else:
            does = probe.elementwise(module)
            if does is None:
                raise Refused(_not_computed(path, module))
            if does != "identity":
                acts.append((len(convs), does, type(module).__name__))
            elif type(module).forward not in (nn.Identity.forward, nn.Sequential.forward):  # empty Sequentials too
                drops.append(module)
    return found


def _layers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions, norms and whatever else has no children, in registration order."""
    inside_conv = {id(m) for conv in block.modules() if isinstance(conv, nn.Conv2d) for m in list(conv.modules())[1:]}
    for path, module in block.named_modules():
        if module is block or id(module) in inside_conv:
            continue
        conv, norm = isinstance(module, nn.Conv2d), _is_norm(module)
        leaf = not module._modules
        if not probe.is_plain_forward(module):
            raise Refused(f"the forward of {path} was replaced on the instance by other code")
        if conv or norm:
            allowed = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
            strange = (set(module._parameters) | set(module._buffers)) - allowed
            if strange or (conv and set(module._modules) - {"parametrizations"}):
                raise Refused(f"{path}: {type(module).__name__} holds more than a {'conv' if conv else 'norm'} layer")
        if conv or norm or leaf:
            yield path, module
        elif own := [*module._parameters, *module._buffers]:
            raise Refused(f"{path}: {type(module).__name__} has a tensor of its own ({own[0]})")
    if own := [*block._parameters, *block._buffers]:
        raise Refused(f"it has a tensor of its own ({own[0]})")


def _is_norm(module: nn.Module) -> bool:
    """BatchNorm in any of its classes, or the frozen kind (torchvision, detectron2, timm): the same four buffers."""
    if isinstance(module, _BatchNorm):
        return True
    return {"weight", "bias", "running_mean", "running_var"} == set(module._buffers) and hasattr(module, "eps")


def _refuse_extra_branches(block: nn.Module, depthwise: nn.Conv2d) -> None:
    """Names squeeze-excite (and what else holds several layers beside the main path) instead of counting its layers."""
    for path, module in block.named_modules():
        inner = [m for m in module.modules() if isinstance(m, _WEIGHTED)]
        if module is block or len(inner) < 2 or any(m is depthwise for m in inner):
            continue
        (enters, narrow), (_, leaves) = _channels(inner[0]), _channels(inner[-1])
        if enters == leaves == depthwise.out_channels and narrow < enters:
            raise Refused(f"squeeze-excite between depthwise and project ({path}: {type(module).__name__})")
        raise Refused(f"{type(module).__name__} is not part of the block that the kernel computes ({path})")


def _channels(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _not_computed(path: str, module: nn.Module) -> str:
    name = type(module).__name__
    if "norm" in name.lower():
        return f"norm {name} is not computed by the kernel, only BatchNorm folds into a convolution ({path})"
    if probe.keeps_shape(module):
        return f"activation {name} is not computed by the kernel, only ReLU6, ReLU and none are ({path})"
    return f"{name} is not part of the block that the kernel computes ({path})"


def _declared_padding(role: str, conv: nn.Conv2d, kernel_sizes: tuple[int, ...]) -> int:
    """The padding that the module declares (its forward may do something else: `probe.confirm`)."""
    for name in ("kernel_size", "stride", "dilation"):
        value = getattr(conv, name)
        if value[0] != value[1]:
            raise Refused(f"{role} {name} {tuple(value)} is not square")
    if conv.kernel_size[0] not in kernel_sizes:
        raise Refused(f"{role} kernel_size {conv.kernel_size[0]} is not computed by the kernel, only {kernel_sizes}")
    if conv.stride[0] not in STRIDES:
        raise Refused(f"{role} stride {conv.stride[0]} is not computed by the kernel, only {STRIDES}")
    _check_conv(role, conv)
    if isinstance(conv.padding, str):
        return conv.dilation[0] * (conv.kernel_size[0] - 1) // 2 if conv.padding == "same" else 0
    if conv.padding[0] != conv.padding[1]:
        raise Refused(f"{role} padding {tuple(conv.padding)} is not square")
    return int(conv.padding[0])


def _check_pointwise(role: str, conv: nn.Conv2d) -> None:
    if not _is_pointwise(conv):
        shape = f"kernel_size {tuple(conv.kernel_size)} and groups {conv.groups}"
        raise Refused(f"{role} convolution has {shape}, expected a plain 1x1")
    if tuple(conv.stride) != (1, 1):
        raise Refused(f"{role} convolution has stride {tuple(conv.stride)}, expected 1")
    if not isinstance(conv.padding, str) and tuple(conv.padding) != (0, 0):
        raise Refused(f"{role} convolution has padding {tuple(conv.padding)}, expected 0")
    _check_conv(role, conv)


def _check_conv(role: str, conv: nn.Conv2d) -> None:
    if conv.padding_mode != "zeros":
        raise Refused(f"{role} convolution has padding_mode {conv.padding_mode!r}, expected 'zeros'")
    if not is_parametrized(conv, "weight") and is_lazy(conv.weight):
        raise Refused(f"{role} convolution is lazy and not initialised yet")


def _norm_of_each(convs: list[nn.Conv2d], norms: list[tuple[int, nn.Module]]) -> list[nn.Module | None]:
    """One norm (or None) for each convolution: by number where the counts agree, else the one registered after it."""
    if len(norms) == len(convs):
        after: list[nn.Module | None] = [norm for _, norm in norms]
    else:
        by_position = dict(norms)
        if len(by_position) != len(norms) or 0 in by_position:
            raise Refused(f"{len(norms)} BatchNorms for {len(convs)} convolutions")
        after = [by_position.get(index + 1) for index in range(len(convs))]
    for conv, norm in zip(convs, after, strict=True):
        if norm is None:
            continue
        mean = norm._buffers["running_mean"]
        if mean is None:
            raise Refused("BatchNorm without running statistics (track_running_stats=False) has nothing to fold")
        if mean.shape[0] != conv.out_channels:
            raise Refused(f"a BatchNorm of {mean.shape[0]} channels for {conv.out_channels}")
    return after


# ---------------------------------------------------------------------------------------------------------------------
# the dense layers around the blocks
# ---------------------------------------------------------------------------------------------------------------------


def _layer_kind(conv: nn.Conv2d) -> str:
    return "head" if tuple(conv.kernel_size) == (1, 1) else "stem"


def _is_dense_layer(module: nn.Module) -> bool:
    """A convolution as stems and heads have it."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    return _is_pointwise(module) or module.in_channels <= PICTURE_CHANNELS


def _find_layers(graph: _Graph, ignore: frozenset[int], blocks: list[nn.Module]) -> Iterator[Candidate]:
    if not any(graph.depthwise.values()) and max(graph.weighted.values()) > 1:
        return
    taken = {id(module) for block in blocks for module in block.modules()} | ignore
    for module in graph.paths:
        if _is_dense_layer(module) and id(module) not in taken:
            assert isinstance(module, nn.Conv2d)
            candidate = _layer_around(graph, module)
            if candidate is not None:
                yield candidate


def _layer_around(graph: _Graph, conv: nn.Conv2d) -> Candidate | None:
    """The candidate that stands for this convolution; None if it is another kind of layer."""
    kind = _layer_kind(conv)
    ancestors = [a for a in graph.ancestors(conv) if _is_callable(a)]
    own = [a for a in ancestors if graph.weighted[a] == 1]
    # The outermost that still computes no more than this: a Sequential(conv, norm) may have its activation outside.
    structure, refusals = None, dict[nn.Module, str]()
    for module in own:
        try:
            found = probe.confirm(_read_layer(module, conv))
        except Refused as refused:
            if structure is not None:
                break
            refusals[module] = str(refused)
            continue
        if found.layer.norm is not None or found.config.activation != "none":  # else a convolution and nothing more
            structure = found
    if structure is not None:
        return Candidate(graph.paths[structure.block], structure.block, kind, structure, "")
    for module, reason in refusals.items():
        if any(map(_is_norm, module.modules())):
            return Candidate(graph.paths[module], module, kind, None, reason)
    if own or not ancestors:
        return None
    try:
        structure = _read_pair(ancestors[0], conv)
    except Refused as refused:
        return Candidate(graph.paths[conv], conv, kind, None, str(refused))
    if structure is not None:
        return Candidate(graph.paths[conv], conv, kind, structure, "")
    after = list(ancestors[0].modules())
    after = after[after.index(conv) + 1 :]
    if not after or not _is_norm(after[0]):
        return None
    if kind == "head" and (conv.out_channels <= conv.in_channels or any(isinstance(m, nn.Conv2d) for m in after)):
        return None  # expand or project of a block that could not be read: the block's row says so
    where = f"{type(ancestors[0]).__name__} {graph.paths[ancestors[0]]!r}"
    others = f"{graph.weighted[ancestors[0]] - 1} other layers"
    reason = f"no module of its own to swap: {where} holds the convolution and its norm together with {others}"
    return Candidate(graph.paths[conv], conv, kind, None, reason)


def _read_pair(owner: nn.Module, conv: nn.Conv2d) -> LayerStructure | None:
    """A convolution and the norm that `owner` calls next, None if it calls another; raises Refused as `_read_layer`."""
    if conv not in owner._modules.values() or (composition := read_composition(owner)) is None:
        return None
    called = [module for _, module in composition.steps]
    at = called.index(conv) if called.count(conv) == 1 else len(called)
    if at + 1 >= len(called) or not _is_norm(called[at + 1]) or called.count(called[at + 1]) > 1:
        return None
    if not isinstance(vars(owner).get(METHOD), FusedFeatures | None):
        raise Refused(f"{METHOD} of {type(owner).__name__} was replaced on the instance by other code")
    pair = nn.Sequential(OrderedDict(composition.steps[at : at + 2]))
    return replace(probe.confirm(_read_layer(pair, conv)), composition=composition)


def _read_layer(module: nn.Module, conv: nn.Conv2d) -> LayerStructure:
    """The layer as its modules show it, a first guess for `probe.confirm`; raises Refused with what does not fit."""
    if not probe.is_plain_forward(module):
        raise Refused("its forward was replaced on the instance by other code")
    convs, norms, acts, drops = _inventory(module)
    kind = _layer_kind(conv)
    padding = _declared_padding(kind, conv, (1,) if kind == "head" else KERNEL_SIZES)
    if conv.dilation[0] != 1 and kind == "stem":
        raise Refused(f"{kind} dilation {conv.dilation[0]} is not computed by the kernel, only 1")
    if len(acts) > 1:
        raise Refused(f"{len(acts)} activations ({', '.join(name for _, _, name in acts)})")
    (norm,) = _norm_of_each(convs, norms)
    activation = acts[0][1] if acts else "none"
    config = LayerConfig(int(conv.stride[0]), padding, activation)
    return LayerStructure(module, ConvNorm(conv, norm), tuple(drops), config)
