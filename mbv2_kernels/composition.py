"""Reads a method that only calls one submodule after the other: timm's `forward_features`.

There a stem's or a head's convolution and norm are attributes of the whole network, with no module around the two that
could be given another forward. What the network does with them stands in the source of the method and nowhere else, so
it is read there, and taken if it can be nothing but

    x = self.NAME(x)        over and over, on the one argument
    return x

with one exception, gradient checkpointing: an `if` on a flag, whose other branch is such a line. The running code must
be what this source compiles to.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn

METHOD = "forward_features"
FLAG = "grad_checkpointing"
_FLAG_TEST = f"self.{FLAG} and (not torch.jit.is_scripting())"


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


def _definition(function: FunctionType, where: str) -> ast.FunctionDef:
    """The syntax tree of a method, if its source can be found and compiles to the code that runs."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise Refused(f"the source of {where} cannot be read: {error}") from error
    (definition,) = tree.body
    running = function.__code__
    codes = [c for c in compile(tree, "", "exec").co_consts if isinstance(c, CodeType) and c.co_name == running.co_name]
    code = codes[0] if codes else None
    if not isinstance(definition, ast.FunctionDef) or code is None:
        raise Refused(f"the source of {where} cannot be read")
    if (code.co_code, code.co_names, code.co_varnames) != (running.co_code, running.co_names, running.co_varnames):
        raise Refused(f"the source of {where} is not that of the code that runs")
    return definition


def _called(statement: ast.stmt, x: str) -> str | None:
    """NAME, if the statement is `x = self.NAME(x)`."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        if isinstance(function, ast.Attribute) and ast.unparse(statement) == f"{x} = self.{function.attr}({x})":
            return function.attr
    return None


def _unparsed(expression: str) -> str:
    return ast.unparse(ast.parse(expression, mode="eval"))
