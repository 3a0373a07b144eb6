"""Finds linear layers whose weight is read by the code of other modules, and which therefore must not be packed.

Packed codes work only where the layer itself is called. A module whose forward multiplies by `self.proj.weight`
(Mamba), or casts its input to `self.proj.weight.dtype` (LongT5), would compute nonsense with them, so such layers are
found before a model is packed. The search reads the source of each module's forward, and of the methods and functions
to which the forward passes the module or its children.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from nf4lora.compat.torch import children_of

Chain = tuple[str, ...]  # the path from a module to one of its descendants; "*" stands for any child

EACH = "*"
DEPTH = 4  # how many nested calls are followed from a forward
BASES = ("torch.nn.modules.module", "transformers.modeling_utils")  # methods that every module has are not searched
HARMLESS = {"device", "requires_grad", "grad", "is_cuda", "is_meta"}  # attributes that are the same for packed codes


@dataclass(frozen=True)
class Reader:
    """The class that reads a layer's weight, and whether it reads the numbers or only their dtype."""

    module: str  # name of the class
    numbers: bool

    def __str__(self) -> str:
        return f"{self.module} reads its weight" + ("" if self.numbers else "'s dtype")


def read_weights(model: nn.Module) -> dict[int, Reader]:
    """The linear layers whose weight is read other than by calling the layer: the reader, by id of the layer.

    >>> class Tied(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return self.up(x) @ self.down.weight
    >>> model = Tied()
    >>> str(read_weights(model)[id(model.down)])                               # doctest: +SKIP
    'Tied reads its weight'
    """
    readers: dict[int, Reader] = {}
    for module in model.modules():
        if "base_layer" in children_of(module):  # PEFT's
            continue
        for chain, numbers in chains_read(cast("Hashable", type(module))).items():
            for layer in _descendants(module, chain):
                if isinstance(layer, nn.Linear) and (numbers or id(layer) not in readers):
                    readers[id(layer)] = Reader(type(module).__name__, numbers)
    return readers


def _descendants(module: nn.Module, chain: Chain) -> Iterator[nn.Module]:
    if not chain:
        while "base_layer" in children_of(module):  # PEFT's layer has its base's weight as an attribute
            module = module.get_submodule("base_layer")
        yield module
    elif chain[0] == EACH:
        for child in module.children():
            yield from _descendants(child, chain[1:])
    elif (named := children_of(module).get(chain[0])) is not None:
        yield from _descendants(named, chain[1:])


@functools.cache
def chains_read(cls: Any) -> dict[Chain, bool]:
    """The descendants whose `weight` the forward of a class reads, and whether it reads more than the dtype."""
    reads: dict[Chain, bool] = {}
    for base in cls.__mro__:  # a forward may call that of its base class
        forward = base.__dict__.get("forward")
        if isinstance(forward, types.FunctionType) and base.__module__ not in BASES:
            _Search(cls, reads, set()).function(forward, {"self": frozenset({()})}, DEPTH)
    reads.pop((), None)  # a module may read its own weight
    return reads


class _Search(ast.NodeVisitor):
    """Searches one function, in which some names are known to hold the module or its descendants."""

    def __init__(self, cls: type, reads: dict[Chain, bool], visited: set[Any]) -> None:
        self.cls, self.reads, self.visited = cls, reads, visited
        self.names: dict[str, frozenset[Chain]] = {}
        self.globals: dict[str, Any] = {}
        self.depth = 0

    def function(self, function: types.FunctionType, arguments: dict[str, frozenset[Chain]], depth: int) -> None:
        """Search a function that gets descendants of the module as the arguments of these names."""
        function = inspect.unwrap(function)
        key = (function.__code__, tuple(sorted(arguments.items())))
        body = _source(function)
        if body is None or depth == 0 or key in self.visited:
            return
        self.visited.add(key)
        self.names, self.globals, self.depth = dict(arguments), function.__globals__, depth
        self.visit(body)

    # ---- which names hold which modules ----

    def chains(self, node: ast.AST | None) -> frozenset[Chain]:
        """The descendants that may be the value of an expression."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, frozenset())
        if isinstance(node, ast.Attribute):
            return frozenset((*chain, node.attr) for chain in self.chains(node.value))
        if isinstance(node, ast.Subscript):
            return frozenset((*chain, EACH) for chain in self.chains(node.value))
        if isinstance(node, (ast.NamedExpr, ast.Await)):
            return self.chains(node.value)
        if isinstance(node, ast.IfExp):
            return self.chains(node.body) | self.chains(node.orelse)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            if len(node.args) >= 2 and isinstance(name := node.args[1], ast.Constant):
                return frozenset((*chain, str(name.value)) for chain in self.chains(node.args[0]))
        return frozenset()

    def bind(self, target: ast.AST, chains: frozenset[Chain]) -> None:
        if isinstance(target, ast.Name) and chains:
            self.names[target.id] = self.names.get(target.id, frozenset()) | chains

    def bind_elements(self, target: ast.AST, container: ast.AST) -> None:
        """Bind the target of `for target in container`; knows enumerate, zip, reversed, .items() and .values()."""
        if isinstance(container, ast.Call):
            called = container.func
            if isinstance(called, ast.Name) and called.id in ("enumerate", "zip", "reversed", "list", "tuple"):
                targets = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
                for element in targets[1:] if called.id == "enumerate" else targets:
                    for argument in container.args:
                        self.bind_elements(element, argument)
                return
            if isinstance(called, ast.Attribute) and called.attr in ("items", "values"):
                target = target.elts[-1] if isinstance(target, ast.Tuple) else target
                self.bind_elements(target, called.value)
                return
        self.bind(target, frozenset((*chain, EACH) for chain in self.chains(container)))

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                self.bind(name, self.chains(value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, self.chains(node.value))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, self.chains(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind_elements(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind_elements(node.target, node.iter)
        self.generic_visit(node)

    def _visit_comprehension_expression(self, node: Any) -> None:
        for generator in node.generators:  # first, although the tree lists the element before them
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension_expression

    # ---- what is read, and which calls are followed ----

    def visit_If(self, node: ast.If) -> None:
        words = {getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node.test)}
        if "pretraining_tp" in words:  # code that slices weights, for models that are no longer made
            self._visit_all(node.orelse)
        elif "uint8" in words:  # code that tests whether the weight is packed before using its dtype
            self._visit_all(node.orelse)
        else:
            self.generic_visit(node)

    def _visit_all(self, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(weight := node.value, ast.Attribute) and weight.attr == "weight":
            if node.attr == "dtype":
                self.reads |= {chain: False for chain in self.chains(weight.value) if chain not in self.reads}
            if node.attr == "dtype" or node.attr in HARMLESS:
                self.visit(weight.value)
                return
        owners = self.chains(node.value)
        if node.attr == "weight" and isinstance(node.ctx, ast.Load):
            self.reads |= dict.fromkeys(owners, True)
        if () in owners:
            attribute = inspect.getattr_static(self.cls, node.attr, None)
            getter = attribute.fget if isinstance(attribute, property) else attribute
            if isinstance(getter, types.FunctionType) and getter.__module__ not in BASES:
                self.follow(getter, {"self": frozenset({()})})  # searched whether it is called here or passed on
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(
            isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops
        ):  # `weight is None` reads nothing
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            return
        self.generic_visit(node)
        callee: Any = None
        positional: list[ast.AST | None] = list(node.args)
        if isinstance(node.func, ast.Name):
            callee = self.globals.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and () in self.chains(node.func.value):
            callee = inspect.getattr_static(self.cls, node.func.attr, None)
            if isinstance(callee, staticmethod):
                callee = callee.__func__
            else:
                positional = [node.func.value, *positional]
        if not isinstance(callee, types.FunctionType) or callee.__module__ in BASES:
            return
        names = callee.__code__.co_varnames[: callee.__code__.co_argcount + callee.__code__.co_kwonlyargcount]
        arguments = dict(zip(names, map(self.chains, positional), strict=False))
        arguments |= {keyword.arg: self.chains(keyword.value) for keyword in node.keywords if keyword.arg}
        if arguments := {name: chains for name, chains in arguments.items() if chains}:
            self.follow(callee, arguments)

    def follow(self, function: types.FunctionType, arguments: dict[str, frozenset[Chain]]) -> None:
        _Search(self.cls, self.reads, self.visited).function(function, arguments, self.depth - 1)


def _source(function: types.FunctionType) -> ast.AST | None:
    """The parsed source of a function; None where there is none (a compiled module, a deleted file).

    inspect.getsource is not used: it reads __file__ of every loaded module, which imports transformers' lazy modules.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        return None
    try:
        return ast.parse(textwrap.dedent("".join(inspect.getblock(lines[code.co_firstlineno - 1 :]))))
    except (SyntaxError, IndexError):
        return None
