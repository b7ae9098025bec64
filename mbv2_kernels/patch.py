"""`fuse`, `unfuse`, `summary`: which blocks of a model, and layers around them, run as one kernel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from .chain import FusedChain, FusedFeatures, has_chain
from .composition import METHOD, NETWORK_METHODS, read_network
from .fold import memo
from .fused_forward import TRAINING, FusedForward, FusedLayer, FusedPair
from .network import MOST_IMAGES, FusedNetwork
from .recognise import LAYER_KINDS, Candidate, LayerStructure, candidates
from .training_forward import MEMORY

ORIGINAL = "original modules"  # the `backend` of a row whose block last ran unfused


@dataclass(frozen=True)
class FusionRow:
    """One block of a model or one dense layer around its blocks, or what looked like one.

    path: as in `model.named_modules()`. kind: inverted_residual, depthwise_separable, stem or head.
    fused: calls run the fused kernel. reason: why not, or why the original modules run at the moment, or, of the two
        kernels of backend "triton", why the last call ran this one.
    backend, tier: what last ran it ("cpu" and "avx2"; "triton" and which of its kernels, "gluon" or "triton";
        "original modules"), None before the first call.
    """

    path: str
    class_name: str
    kind: str
    fused: bool
    reason: str
    backend: str | None
    tier: str | None


@dataclass(frozen=True)
class FusionReport:
    """The rows of `summary`, in the order of the model; `str()` is a table.

    networks: paths of modules whose features, mean over all pixels and classifier are one call for a few images, as
        far as was seen at the last call. slower_networks: those that could be, with the reason why they are not.
    """

    rows: tuple[FusionRow, ...]
    networks: tuple[str, ...] = ()
    slower_networks: tuple[tuple[str, str], ...] = ()

    def __iter__(self) -> Iterator[FusionRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> FusionRow:
        return self.rows[index]

    def __str__(self) -> str:
        lines = [("block", "class", "kind", "fused", "backend", "tier", "reason")]
        for row in self.rows:
            fused = "yes" if row.fused else "no"
            place = (row.path or "(root)", row.class_name, row.kind)
            lines.append((*place, fused, row.backend or "-", row.tier or "-", row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        table.insert(1, "  ".join("-" * w for w in widths))
        layers = [row for row in self.rows if row.kind in LAYER_KINDS]
        blocks = [row for row in self.rows if row.kind not in LAYER_KINDS]
        count = f"{sum(row.fused for row in blocks)} of {len(blocks)} blocks fused"
        if layers:
            count += f", {sum(row.fused for row in layers)} of {len(layers)} layers around them"
        for path in self.networks:
            table.append(f"{path or '(root)'}: one call from images to classes, for up to {MOST_IMAGES} images on CPUs")
        for path, reason in self.slower_networks:
            table.append(f"{path or '(root)'}: not one call from images to classes: {reason}")
        return "\n".join([*table, count])


def fuse(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    memory: str = "fast",
) -> nn.Module:
    """Makes every block of `model` that the fused kernel computes exactly run fused, in place; returns `model`.

    So do the stem and the head, dense convolutions with BatchNorm and activation in a module of their own (on CPUs).
    An `nn.Sequential` with several of them next to each other runs them by one call (see `chain`), and so does a
    network whose `forward_features` only calls its submodules in a row (timm). A network that only classifies the mean
    of its features (torchvision's MobileNetV2, timm's EfficientNet, `models`) is one call, for a few images.

    Found by structure (see `recognise`) and confirmed by running each block once on small inputs. Class, path,
    submodules, parameters, `state_dict`, hooks of the block stay; `unfuse` undoes it. The original modules run whenever
    something inside the block asks for it (hooks, a replaced layer, an active dropout): `summary` says why.

    Calling it again checks every block anew and drops folded weights: do so after editing a block's layers, or its
    parameters through `.data`. Call `unfuse` before torch.jit.script.

    Args:
        filter_fn: called with (module, path) for every candidate; those it returns False for are left as they are.
        strict: raise RuntimeError, before anything is changed, if there is nothing to fuse or a block cannot be fused
            (a stem or head that cannot is no reason: what they cost is small).
        memory: what training keeps for backward, beside each block's input and its output before the last BatchNorm.
            "fast": what the depthwise convolution gave, and with 96 input channels or more, in eager mode on CPUs, in
            float32, what it read; "lean": nothing, it is computed again. Of a head the same two are kept in both, of a
            stem its input alone.

    Raises TypeError if `model` is no nn.Module or `filter_fn` cannot be called, ValueError for another `memory`.
    """
    _check_module("fuse", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, path), got {type(filter_fn).__name__}")
    chosen = [c for c in candidates(model) if filter_fn is None or filter_fn(c.module, c.path)]
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    if strict:
        _check_all_fusable(chosen)
    if filter_fn is None:
        unfuse(model)
    again = {candidate.module for candidate in chosen}
    pairs = [pair for pair in _pairs(model) if pair.layer.conv not in again]
    for candidate in chosen:
        _unfuse_one(candidate.module)
        if candidate.structure is None:
            continue
        forward = _forward_of(candidate, memory)
        forward.block.forward = forward
        if isinstance(forward, FusedPair):
            pairs.append(forward)
    for module in model.modules():
        if own := [pair for pair in pairs if pair.composition.owner is module]:
            setattr(module, METHOD, FusedFeatures(own))
        if has_chain(module):
            module.forward = FusedChain(module)
    for module in model.modules():
        if (network := read_network(module)) is not None and network.method not in vars(module):
            setattr(module, network.method, FusedNetwork(network))
    memo.clear()  # which makes chains look anew, too
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every block of `model` its original forward back, in place; returns `model`."""
    _check_module("unfuse", model)
    for module in model.modules():
        _unfuse_one(module)
    return model


def summary(model: nn.Module) -> FusionReport:
    """What `fuse` did to each block, stem and head of `model`, what last ran it, and why the others were refused."""
    _check_module("summary", model)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    pairs: dict[nn.Module, FusedPair] = {pair.layer.conv: pair for pair in _pairs(model)}
    fused = {path: (m, f) for path, m in model.named_modules() if (f := pairs.get(m) or _fused_forward(m)) is not None}
    convs = [layer.conv for _, f in fused.values() for layer in f.layers if layer is not None]
    rows = [_fused_row(path, module, forward) for path, (module, forward) in fused.items()]
    rows += [_unfused_row(c) for c in candidates(model, ignore=convs)]
    found = ((path, vars(m).get(method)) for path, m in model.named_modules() for method in NETWORK_METHODS)
    obstacles = [(path, network.obstacle()) for path, network in found if isinstance(network, FusedNetwork)]
    networks = tuple(path for path, obstacle in obstacles if obstacle is None)
    slower = tuple((path, obstacle) for path, obstacle in obstacles if obstacle is not None)
    return FusionReport(tuple(sorted(rows, key=lambda row: order[row.path])), networks, slower)


def fused_parts(model: nn.Module) -> dict[str, nn.Module]:
    """What runs fused in `model`, by the paths that `summary` shows.

    A convolution and a norm that their network calls in a row are a Sequential, which is no part of `model`.
    """
    pairs: dict[nn.Module, nn.Module] = {pair.layer.conv: pair.block for pair in _pairs(model)}
    modules = {row.path: model.get_submodule(row.path) for row in summary(model) if row.fused}
    return {path: pairs.get(module, module) for path, module in modules.items()}


def unfused_part(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """What stands in `model`, an unfused twin, for `part` of a fused model at `path` (see `fused_parts`)."""
    if not isinstance(_fused_forward(part), FusedPair):
        return model.get_submodule(path)
    owner = model.get_submodule(path.rpartition(".")[0])
    return nn.Sequential(OrderedDict((name, owner.get_submodule(name)) for name in part._modules))


def _fused_row(path: str, module: nn.Module, forward: FusedForward) -> FusionRow:
    refusal = forward.refusal()
    fused = refusal is None or refusal.startswith(TRAINING)
    reason = refusal or forward.last_reason or ""
    backend: str | None = None
    tier: str | None = None
    if forward.last_reason is not None:
        backend = ORIGINAL
    elif run := forward.what_ran():
        backend, tier, reason = run.backend, run.tier, reason or run.reason
    return FusionRow(path, type(module).__name__, forward.kind, fused, reason, backend, tier)


def _unfused_row(candidate: Candidate) -> FusionRow:
    reason = candidate.reason
    if candidate.structure is not None:
        reason = "can be fused: fuse() was not called on it, or its filter_fn left it out"
    return FusionRow(candidate.path, type(candidate.module).__name__, candidate.kind, False, reason, None, None)


def _check_all_fusable(chosen: list[Candidate]) -> None:
    blocks = [c for c in chosen if c.kind not in LAYER_KINDS]
    refused = [c for c in blocks if c.structure is None]
    if not blocks and all(c.structure is None for c in chosen):
        raise RuntimeError("fuse(strict=True): the model holds no block with a depthwise convolution to fuse")
    if refused:
        lines = [f"  {c.path or '(root)'} ({type(c.module).__name__}): {c.reason}" for c in refused]
        head = f"fuse(strict=True): {len(refused)} of {len(blocks)} blocks cannot be fused, the model is unchanged:"
        raise RuntimeError("\n".join([head, *lines]))


def _forward_of(candidate: Candidate, memory: str) -> FusedForward:
    structure = candidate.structure
    assert structure is not None
    if isinstance(structure, LayerStructure):
        return (FusedLayer if structure.composition is None else FusedPair)(structure, candidate.path)
    return FusedForward(structure, candidate.path, memory)


def _fused_forward(module: nn.Module) -> FusedForward | None:
    forward = vars(module).get("forward")
    return forward if isinstance(forward, FusedForward) else None


def _pairs(model: nn.Module) -> list[FusedPair]:
    features = (vars(module).get(METHOD) for module in model.modules())
    return [pair for f in features if isinstance(f, FusedFeatures) for pair in f.pairs.values()]


def _unfuse_one(module: nn.Module) -> None:
    for name in dict.fromkeys(("forward", METHOD, *NETWORK_METHODS)):
        if isinstance(vars(module).get(name), FusedForward | FusedChain):
            delattr(module, name)


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
