"""The mutants of a file: the operators of mutmut and three of our own, each applied at one place of its source."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import Mutation, MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

MODULE = "<module>"


@dataclass(frozen=True)
class Mutant:
    """A source with one change. ``key`` names it whatever lines come and go around it."""

    file: str
    function: str
    operator: str
    original: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        lines = list(difflib.ndiff(self.original.splitlines(), self.source.splitlines()))
        before, after = ("\n".join(line[2:].strip() for line in lines if line[:2] == sign) for sign in ("- ", "+ "))
        return (self.file, self.function, self.operator, before, after)

    @property
    def diff(self) -> str:
        sources = (self.original.splitlines(), self.source.splitlines())
        header = f"{self.file} ({self.function}, {self.operator})"
        return "\n".join(difflib.unified_diff(*sources, self.file, header, lineterm="", n=2))


def negate(node: cst.If | cst.While | cst.CompIf) -> Iterator[cst.CSTNode]:
    """Go the other way: ``if a`` -> ``if not (a)``."""
    inner = node.test.with_changes(lpar=[*node.test.lpar, cst.LeftParen()], rpar=[*node.test.rpar, cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(operator=cst.Not(), expression=inner))


def leave_out(node: cst.Expr | cst.Raise) -> Iterator[cst.CSTNode]:
    """Do not call, do not raise."""
    if isinstance(node, cst.Raise) or isinstance(node.value, cst.Call):
        yield cst.Pass()


def let_pass(node: cst.ExceptHandler) -> Iterator[cst.CSTNode]:
    """Catch one class of exception less."""
    if isinstance(node.type, cst.Tuple):
        for number in range(len(node.type.elements)):
            rest = [one for place, one in enumerate(node.type.elements) if place != number]
            yield node.with_changes(type=node.type.with_changes(elements=rest))
    elif node.type is not None:
        yield node.with_changes(type=cst.Tuple([]))


OPERATORS = [
    *mutation_operators,
    ((cst.If, cst.While, cst.CompIf), negate),
    ((cst.Expr, cst.Raise), leave_out),
    (cst.ExceptHandler, let_pass),
]


def is_prose(node: cst.CSTNode) -> bool:
    """Tell whether a text is for people (it has a space): how it is worded is no behaviour."""
    return m.matches(node, m.SimpleString()) and " " in cst.ensure_type(node, cst.SimpleString).value


def _without_strict(source: str) -> str:
    """Leave out ``strict=True`` of zip(): what it checks is that a mistake of ours is loud, and there is none."""
    return re.sub(r", (strict=\w+)?(?=\))", "", source)


def mutants(file: str, source: str) -> list[Mutant]:
    """Return all mutants of ``source``, in the order of its functions; no two of them are the same."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    statements = [Statement(wrapper.module, node) for node in wrapper.module.body]
    home = {node: (number, name) for number, one in enumerate(statements) for node, name in one.nodes()}
    found: dict[str, tuple[int, Mutant]] = {}
    for types, operator in OPERATORS:
        # One operator at a time, because a mutation does not tell which one made it.
        visitor = MutationVisitor([(types, operator)], IgnoredCode(set(), set(), set()))
        wrapper.visit(visitor)
        for mutation in visitor.mutations:
            if is_prose(mutation.original_node):
                continue
            number, name = home[mutation.original_node]
            changed = source.replace(statements[number].code, statements[number].changed(mutation), 1)
            mutant = Mutant(file, name, operator.__name__.removeprefix("operator_"), source, changed)
            if _without_strict(changed) != _without_strict(source) and _compiles(changed):
                found.setdefault(changed, (number, mutant))
    return [mutant for _number, mutant in sorted(found.values(), key=lambda one: (one[0], one[1].function))]


class Statement:
    """A statement of a module: a function, a class, an assignment. To replace a node in it is quicker than in all."""

    def __init__(self, module: cst.Module, node: cst.CSTNode) -> None:
        self.module, self.node = module, node
        self.code = module.code_for_node(node)

    def nodes(self) -> Iterator[tuple[cst.CSTNode, str]]:
        """Yield every node with the qualified name of the function it is in."""
        if isinstance(self.node, cst.ClassDef):
            for member in self.node.body.body:
                name = f"{self.node.name.value}.{member.name.value}" if isinstance(member, cst.FunctionDef) else MODULE
                yield from ((node, name) for node in _walk(member))
        else:
            name = self.node.name.value if isinstance(self.node, cst.FunctionDef) else MODULE
            yield from ((node, name) for node in _walk(self.node))

    def changed(self, mutation: Mutation) -> str:
        node = self.node.deep_replace(mutation.original_node, mutation.mutated_node)
        return self.module.code_for_node(cst.ensure_type(node, cst.CSTNode))


def _walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True
