"""Reads methods whose source says that they only call one submodule after the other: timm's `forward_features`.

There a stem's or a head's convolution and norm are attributes of the whole network, with no module around the two that
could be given another forward. What the network does with them stands in the source of the method and nowhere else, so
it is read there, and taken if it can be nothing but

    x = self.NAME(x)        over and over, on the one argument
    return x

with one exception, gradient checkpointing: an `if` on a flag, whose other branch is such a line. In the same way
`_forward_impl` (torchvision) is read, which takes the mean of its features and classifies it. The running code must be
what this source compiles to.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch import nn

METHOD = "forward_features"
FLAG = "grad_checkpointing"
_FLAG_TEST = f"self.{FLAG} and (not torch.jit.is_scripting())"

# torchvision's MobileNetV2 from images to classes.
NETWORK_METHOD = "_forward_impl"
_NETWORK = (
    "{x} = nn.functional.adaptive_avg_pool2d({x}, (1, 1))",
    "{x} = torch.flatten({x}, 1)",
)


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


def read(owner: nn.Module) -> Composition | None:
    """What `owner.forward_features` calls; None if there is no such method, raises Refused if it does more."""
    function = inspect.getattr_static(type(owner), METHOD, None)
    if not isinstance(function, FunctionType):
        return None
    where = f"{METHOD} of {type(owner).__name__}"
    definition = _definition(function, where)
    arguments = definition.args
    if [a.arg for a in arguments.args][:1] != ["self"] or len(arguments.args) != 2 or definition.decorator_list:
        raise Refused(f"{where} takes more than one tensor")
    x = arguments.args[1].arg
    steps: list[tuple[str, nn.Module]] = []
    flag = None
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
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


def read_network(owner: nn.Module) -> tuple[str, str] | None:
    """The names (A, B) of submodules, if `owner._forward_impl` is known to be B(mean over all pixels of A(x))."""
    function = inspect.getattr_static(type(owner), NETWORK_METHOD, None)
    if not isinstance(function, FunctionType):
        return None
    try:
        definition = _definition(function, NETWORK_METHOD)
    except Refused:
        return None
    names, arguments = function.__globals__, definition.args
    if names.get("torch") is not torch or names.get("nn") is not nn or len(arguments.args) != 2:
        return None
    x = arguments.args[1].arg
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    middle = [_unparsed(line.format(x=x), "exec") for line in _NETWORK]
    if len(body) != 5 or [ast.unparse(s) for s in body[1:3]] != middle or ast.unparse(body[4]) != f"return {x}":
        return None
    first, last = _called(body[0], x), _called(body[3], x)
    return None if first is None or last is None else (first, last)


def _definition(function: FunctionType, where: str) -> ast.FunctionDef:
    """The syntax tree of a method, if its source can be found and compiles to the code that runs.

    The whole file is compiled: what a call compiles to depends on which names are imported modules.
    """
    running = function.__code__
    line = running.co_firstlineno
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
        code = next((c for c in _codes(compile(tree, "", "exec")) if c.co_firstlineno == line), None)
    except (OSError, TypeError, SyntaxError) as error:
        raise Refused(f"the source of {where} cannot be read: {error}") from error
    definitions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.lineno == line)
    definition = next(definitions, None)
    if definition is None or code is None:
        raise Refused(f"the source of {where} cannot be read")
    if (code.co_code, code.co_names, code.co_varnames) != (running.co_code, running.co_names, running.co_varnames):
        raise Refused(f"the source of {where} is not that of the code that runs")
    return definition


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
