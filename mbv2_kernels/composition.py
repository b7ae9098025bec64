"""Reads methods whose source says that they only call one submodule after the other: timm's `forward_features`.

There a stem's or a head's convolution and norm are attributes of the whole network, with no module around the two that
could be given another forward. What the network does with them stands in the source of the method and nowhere else, so
it is read there, and taken if it can be nothing but

    x = self.NAME(x)        over and over, on the one argument
    return x

with one exception, gradient checkpointing: an `if` on a flag, whose other branch is such a line. In the same way
`_forward_impl` (torchvision), or `forward` and `forward_head` (timm), are read, which take the mean of the features and
classify it. The running code must be what this source compiles to.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch import nn

METHOD = "forward_features"
FLAG = "grad_checkpointing"
_FLAG_TEST = f"self.{FLAG} and (not torch.jit.is_scripting())"

# From images to classes: torchvision's MobileNetV2, and timm's EfficientNet with its head.
NETWORK_METHODS = ("_forward_impl", "forward")
HEAD = "forward_head"
_TORCHVISION = """
{x} = self.{features}({x})
{x} = nn.functional.adaptive_avg_pool2d({x}, (1, 1))
{x} = torch.flatten({x}, 1)
{x} = self.{classifier}({x})
return {x}
"""
_TIMM = f"""
x = self.{METHOD}(x)
x = self.{HEAD}(x)
return x
"""
_TIMM_HEAD = """
{x} = self.{pool}({x})
if self.drop_rate > 0.0:
    {x} = F.dropout({x}, p=self.drop_rate, training=self.training)
return {x} if pre_logits else self.{classifier}({x})
"""


class Refused(Exception):
    """A module is not what the fused kernel computes; the text is the reason that a user reads."""


@dataclass(frozen=True)
class Composition:
    """`owner.forward_features(x)` calls the modules of `steps`, which are attributes of `owner`, one after the other.

    flag: an attribute of `owner` that has to be false for that; None if there is none.
    """

    owner: nn.Module
    steps: tuple[tuple[str, nn.Module], ...]
    flag: str | None

    def overridden(self) -> str | None:
        """Why the method would do something else now, or None."""
        if self.flag is not None and getattr(self.owner, self.flag):
            return f"{self.flag} of {type(self.owner).__name__} is set"
        for name, module in self.steps:
            if self.owner._modules.get(name) is not module:
                return f"submodule {name!r} of {type(self.owner).__name__} was replaced since fuse(): call fuse() again"
        return None


@dataclass(frozen=True)
class Network:
    """`owner`'s method `method` is classifier(mean over all pixels of features(x)).

    features, classifier: names of the submodules; features may be `METHOD`. pool: the module that takes the mean, the
    averaging and the flattening one in it; empty if the method does that itself. drops: it drops features at the rate
    `owner.drop_rate` in training.
    """

    owner: nn.Module
    method: str
    features: str
    classifier: str
    pool: tuple[nn.Module, ...] = ()
    drops: bool = False


def read(owner: nn.Module) -> Composition | None:
    """What `owner.forward_features` calls; None if there is no such method, raises Refused if it does more."""
    function = inspect.getattr_static(type(owner), METHOD, None)
    return _read_calls(owner, function) if isinstance(function, FunctionType) else None


def _read_calls(owner: nn.Module, function: FunctionType) -> Composition:
    where = f"{function.__name__} of {type(owner).__name__}"
    definition = _definition(function, where)
    arguments = definition.args
    if [a.arg for a in arguments.args][:1] != ["self"] or len(arguments.args) != 2 or definition.decorator_list:
        raise Refused(f"{where} takes more than one tensor")
    x = arguments.args[1].arg
    steps: list[tuple[str, nn.Module]] = []
    flag = None
    body = _body(definition)
    for statement in body[:-1]:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == _unparsed(_FLAG_TEST):
            flag = FLAG
            statement = statement.orelse[0] if len(statement.orelse) == 1 else statement
        name = _called(statement, x)
        module = None if name is None else owner._modules.get(name)
        if name is None or module is None:
            raise Refused(f"{where} does more than call one submodule after the other: {ast.unparse(statement)}")
        steps.append((name, module))
    if ast.unparse(body[-1]) != f"return {x}":
        raise Refused(f"{where} returns something else than {x}")
    return Composition(owner, tuple(steps), flag)


def read_network(owner: nn.Module) -> Network | None:
    """What takes images to classes, if it is known to be a classifier on the mean over all pixels of features."""
    try:
        return _read_torchvision(owner) or _read_timm(owner)
    except Refused:
        return None


def _read_torchvision(owner: nn.Module) -> Network | None:
    method = NETWORK_METHODS[0]
    names = _matched(owner, method, _TORCHVISION, {"torch": torch, "nn": nn})
    return None if names is None else Network(owner, method, names["features"], names["classifier"])


def _read_timm(owner: nn.Module) -> Network | None:
    method = NETWORK_METHODS[1]
    if _matched(owner, method, _TIMM, {}) is None:
        return None
    names = _matched(owner, HEAD, _TIMM_HEAD, {"F": nn.functional}, {"pre_logits": False})
    pool = None if names is None else owner._modules.get(names["pool"])
    forward = inspect.getattr_static(type(pool), "forward", None)
    if names is None or pool is None or not isinstance(forward, FunctionType):
        return None
    modules = [module for _, module in _read_calls(pool, forward).steps]
    if [type(module) for module in modules] != [nn.AdaptiveAvgPool2d, nn.Flatten]:
        return None
    return Network(owner, method, METHOD, names["classifier"], (pool, *modules), drops=True)


def _matched(
    owner: nn.Module, method: str, pattern: str, modules: dict[str, object], options: dict[str, object] | None = None
) -> dict[str, str] | None:
    """The names that `pattern` has in braces, if the source of `owner`'s method reads like it but for them.

    {x} is the method's tensor. modules: what names in it must mean. options: the arguments after the tensor, and what
    they are if not given.
    """
    options = options or {}
    function = inspect.getattr_static(type(owner), method, None)
    if not isinstance(function, FunctionType) or (function.__defaults__ or ()) != tuple(options.values()):
        return None
    definition = _definition(function, method)
    arguments = definition.args
    names = [argument.arg for argument in arguments.args]
    if len(names) != 2 + len(options) or names[0] != "self" or names[2:] != [*options]:
        return None
    if arguments.posonlyargs or arguments.vararg or arguments.kwonlyargs or arguments.kwarg:
        return None
    if definition.decorator_list or any(function.__globals__.get(name) is not m for name, m in modules.items()):
        return None
    fields = {field: f"FIELD_{field}" for _, field, *_ in string.Formatter().parse(pattern) if field}
    expected = re.escape(_unparsed(pattern.format(**{**fields, "x": names[1]}), "exec"))
    for field, mark in fields.items():
        expected = expected.replace(mark, rf"(?P<{field}>\w+)")
    match = re.fullmatch(expected, ast.unparse(ast.Module(_body(definition), [])))
    return None if match is None else match.groupdict()


def _body(definition: ast.FunctionDef) -> list[ast.stmt]:
    return definition.body[1:] if ast.get_docstring(definition) is not None else definition.body


def _definition(function: FunctionType, where: str) -> ast.FunctionDef:
    """The syntax tree of a method, if its source can be found and compiles to the code that runs.

    The whole file is compiled: what a call compiles to depends on which names are imported modules.
    """
    running = function.__code__
    line = running.co_firstlineno
    try:
        definition, code = _function_at("".join(inspect.findsource(function)[0]), line)
    except (OSError, TypeError, SyntaxError) as error:
        raise Refused(f"the source of {where} cannot be read: {error}") from error
    if definition is None or code is None:
        raise Refused(f"the source of {where} cannot be read")
    if (code.co_code, code.co_names, code.co_varnames) != (running.co_code, running.co_names, running.co_varnames):
        raise Refused(f"the source of {where} is not that of the code that runs")
    return definition


@functools.lru_cache(maxsize=64)
def _function_at(source: str, line: int) -> tuple[ast.FunctionDef | None, CodeType | None]:
    """The syntax tree of the function that starts at a line of a file, and what it compiles to.

    Remembered: every module of a network is asked for, of few classes in long files.
    """
    tree = ast.parse(source)
    code = next((c for c in _codes(compile(tree, "", "exec")) if c.co_firstlineno == line), None)
    definitions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.lineno == line)
    return next(definitions, None), code


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The functions in `code`, and those in them."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _called(statement: ast.stmt, x: str) -> str | None:
    """NAME, if the statement is `x = self.NAME(x)`."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        if isinstance(function, ast.Attribute) and ast.unparse(statement) == f"{x} = self.{function.attr}({x})":
            return function.attr
    return None


def _unparsed(code: str, mode: str = "eval") -> str:
    return ast.unparse(ast.parse(code, mode=mode))
