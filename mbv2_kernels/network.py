"""A whole network as one call: the chain of its features, the mean over all pixels and the classifier.

When a network has run, its weights and activations have passed through the caches once, and what Python and torch need
for the next call is no longer there: each small operation behind the blocks (pooling, flatten, dropout, the linear
layer) then costs several times of what it costs in a loop of its own, all of them together as much as a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .chain import FusedChain, OneCall, Plan, Run, calls_forward_only, is_sequential
from .composition import NETWORK_METHOD
from .shortcut import Look

MOST_IMAGES = 8  # for more a product in register tiles, which torch's is, is as fast as the op's or faster

_CLASSIFY = torch.ops.mbv2.chain_classify.default
_PLAIN = (nn.Parameter, Tensor)


class FusedNetwork(FusedChain):
    """Stands in for a method that is `classifier(mean over all pixels of features(x))` (see `composition`).

    features, classifier: names of the submodules. Wherever anything but that is to be done, and for more than a few
    images, the method runs as ever, and the chain in it decides for itself; so does the first call, which plans it.
    """

    def __init__(self, owner: nn.Module, features: str, classifier: str) -> None:
        super().__init__(owner)
        self.features = features
        self.classifier = classifier
        self._linear: nn.Linear | None = None  # of the classifier, while a plan holds

    def closely(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] > MOST_IMAGES:
            return self.one_by_one(x)
        return super().closely(x)

    def one_by_one(self, x: Any) -> Any:
        return getattr(type(self.block), NETWORK_METHOD)(self.block, x)

    def children(self) -> list[nn.Module | None]:
        return [self.block._modules.get(self.features)]

    def is_overridden(self) -> bool:
        # Without a plan for the features there is none for the whole: asking their children again would be futile.
        plan = self._features_plan()
        return plan is None or not plan.holds(plan.dtype) or not self._tail()

    def is_one_call(self) -> bool:
        """Whether a few images ran, or would run now, as one call: for `summary`."""
        plan = self._features_plan()
        return plan is not None and [type(link) for link in plan.links] == [Run] and not self.is_overridden()

    def _features_plan(self) -> Plan | None:
        """Of the features' own chain; None if calling them is more than that."""
        features = self.block._modules.get(self.features)
        if features is None or not calls_forward_only(features):
            return None
        chain = vars(features).get("forward")
        return chain.plan if isinstance(chain, FusedChain) else None

    def _tail(self) -> list[Any]:
        """The classifier's modules, the linear layer last; nothing if they are to do more than that layer does."""
        top = self.block._modules.get(self.classifier)
        if top is None:
            return []
        modules = [top, *top._modules.values()] if is_sequential(top) else [top]
        if not all(isinstance(m, nn.Module) and calls_forward_only(m) and "forward" not in vars(m) for m in modules):
            return []
        *before, linear = modules
        drops = [m for m in before if m is not top]
        if type(linear) is not nn.Linear or any(type(m) is not nn.Dropout or m.training for m in drops):
            return []
        return modules

    def looks(self) -> Iterator[Look]:
        yield from super().looks()
        *before, linear = self._tail()
        for module in before:
            settings = (("training", False),) if isinstance(module, nn.Dropout) else ()
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
