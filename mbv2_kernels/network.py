"""A whole network as one call: the chain of its features, the mean over all pixels and the classifier.

When a network has run, its weights and activations have passed through the caches once, and what Python and torch need
for the next call is no longer there: each small operation behind the blocks (pooling, flatten, dropout, the linear
layer) then costs several times of what it costs in a loop of its own, all of them together as much as a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .chain import FusedChain, OneCall, Plan, Run, calls_forward_only, is_sequential
from .composition import HEAD, METHOD, Network
from .shortcut import UNPLANNED, Look

MOST_IMAGES = 8  # for more a product in register tiles, which torch's is, is as fast as the op's or faster

_CLASSIFY = torch.ops.mbv2.chain_classify.default
_PLAIN = (nn.Parameter, Tensor)


class FusedNetwork(FusedChain):
    """Stands in for a method that is `classifier(mean over all pixels of features(x))`.

    Wherever anything but that is to be done, and for more than a few images, the method runs as ever, and the chain in
    it decides for itself; so does the first call, which plans it.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network.owner)
        self.network = network
        self._linear: nn.Linear | None = None  # of the classifier, while a plan holds

    def closely(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] > MOST_IMAGES:
            return self.one_by_one(x)
        return super().closely(x)

    def one_by_one(self, x: Any) -> Any:
        return getattr(type(self.block), self.network.method)(self.block, x)

    def children(self) -> Iterable[nn.Module | None]:
        if self.network.features != METHOD:
            return [self.block._modules.get(self.network.features)]  # which is looked into, and at
        chain = self._features_chain()
        return [] if chain is None else chain.children()

    def is_overridden(self) -> bool:
        return self.obstacle() is not None

    def obstacle(self) -> str | None:
        """Why a few images would not run as one call now, as far as was seen at the last call; None if they would."""
        if UNPLANNED:
            return UNPLANNED
        chain = self._features_chain()
        if chain is None:
            return f"calling {self.network.features} is more than running fused modules"
        # Without a plan for the features there is none for the whole: asking their children again would be futile.
        plan = chain.plan
        if plan is None or not plan.holds(plan.dtype):
            return (
                f"{self.network.features} did not run as planned: not called yet, or not without gradients, or changed"
            )
        if chain.one_call(plan) is None:
            return f"not all modules of {self.network.features} run fused"
        return self._changed_tail()

    def _features_chain(self) -> FusedChain | None:
        """What runs the features; None if calling them is more than that."""
        if self.network.features == METHOD:
            chain = vars(self.block).get(METHOD)
        else:
            features = self.block._modules.get(self.network.features)
            chain = None if features is None or not calls_forward_only(features) else vars(features).get("forward")
        return chain if isinstance(chain, FusedChain) else None

    def _changed_tail(self) -> str | None:
        """Why what follows the features would be more now than a mean and a linear layer; None if it would not."""
        network, block = self.network, self.block
        if network.drops and block.training and block.drop_rate > 0:  # type: ignore[operator]
            return "dropout is active"
        if network.features == METHOD and HEAD in vars(block):
            return f"{HEAD} was replaced on the instance"
        if network.pool:
            pool, mean, flatten = network.pool
            if pool not in block._modules.values() or [*pool._modules.values()] != [mean, flatten]:
                return "the pooling layer was replaced"
            if mean.output_size not in (1, (1, 1)) or (flatten.start_dim, flatten.end_dim) != (1, -1):
                return "the pooling layer does more than take a mean"
        *before, linear = self._tail()
        for module in (*before, linear):
            if not isinstance(module, nn.Module) or not calls_forward_only(module) or "forward" in vars(module):
                return f"hooks on {network.classifier} or the pooling layer, or a call of their own"
        drops = [m for m in before if m not in network.pool and not is_sequential(m)]
        if type(linear) is not nn.Linear or any(type(m) is not nn.Dropout for m in drops):
            return f"{network.classifier} is more than a linear layer"
        if any(m.training for m in drops):
            return "dropout is active"
        return None

    def _tail(self) -> list[Any]:
        """The modules that are called behind the features, the classifier's last."""
        top = self.block._modules.get(self.network.classifier)
        is_row = top is not None and is_sequential(top) and top._modules
        return [*self.network.pool, top, *(top._modules.values() if is_row else ())]  # type: ignore[union-attr]

    def looks(self) -> Iterator[Look]:
        yield from super().looks()
        network, chain = self.network, self._features_chain()
        if network.features == METHOD and chain is not None:
            yield from chain.looks()
            yield Look(self.block, settings=((METHOD, chain), (HEAD,)))
        if network.drops:
            settings = tuple((name, getattr(self.block, name)) for name in ("training", "drop_rate"))
            yield Look(self.block, settings=settings)
        *before, linear = self._tail()
        for module in before:
            names = ("training",) if isinstance(module, nn.Dropout) else ("output_size", "start_dim", "end_dim")
            settings = tuple((name, vars(module)[name]) for name in names if name in vars(module))
            yield Look(module, True, None, tuple(module._modules.items()), settings)
        self._linear = linear
        yield Look(linear, True, None, tensors=tuple(("_parameters", name) for name in linear._parameters))

    def run(self, plan: Plan, x: Any) -> Any:
        call = self.one_call(plan) if plan.complete else None
        return self.one_by_one(x) if call is None or x.shape[1] != call.channels else call.op(x, *call.arguments)

    def one_call(self, plan: Plan) -> OneCall | None:
        features, linear = super().one_call(plan), self._linear
        if features is None or linear is None:
            return None
        weight, bias = linear.weight, linear.bias
        tensors = (weight,) if bias is None else (weight, bias)
        run = plan.links[0]
        if not isinstance(run, Run) or weight.dim() != 2 or weight.shape[1] != run.out_channels:
            return None
        if any(type(t) not in _PLAIN or t.dtype is not plan.dtype or not t.is_cpu for t in tensors):
            return None
        return OneCall(_CLASSIFY, (*features.arguments, weight, bias), features.channels, MOST_IMAGES)
