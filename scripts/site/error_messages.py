"""Messages of the errors and warnings in the package's code, read from its source."""

from __future__ import annotations

import ast
import builtins
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torch_secondorder"

#: More variants of one message than these are shown with a placeholder.
MOST_VARIANTS = 6
MOST_VARIANTS_OF_CHECKS = 24  # one function makes the messages of most arguments

#: Variables, and parameters, that stand for anything, whatever the code says.
ANY_VALUE = {"also", "at", "hint", "message", "name", "place", "size", "source"}
ANY_ARGUMENT = ANY_VALUE | {"operation", "what"}

#: Functions with more calls than these are not asked for the texts that they are given.
MOST_CALLS = 40

#: Exceptions that the package catches itself, and the argument-less ones of Python's protocols.
INTERNAL = {
    *("EvaluationsSpent", "IdleClosure", "InseparableLoss", "NotFinite", "Rejected"),
    *("SampledConstraints", "Unsupported", "_NeverRaised", "_NotFinite", "_Outdated"),
    *("IndexError", "StopIteration", "KeyError"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """The text of an error or a warning, with placeholders such as `<name>`.

    Attributes:
        kind: The class, such as `"ValueError"`.
        text: The text.
        file: The file, below the package, without its ending.
        place: The function that makes it, with its class.
    """

    kind: str
    text: str
    file: str
    place: str


class Source:
    """A file of the package, with what is needed to read the texts in it."""

    def __init__(self, path: Path) -> None:
        self.file = path.relative_to(PACKAGE).with_suffix("").as_posix()
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.constants = {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        nodes = list(ast.walk(self.tree))
        self.functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
        self.imported = {
            alias.asname or alias.name: ((node.module or "").split(".", 1)[-1], alias.name)
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }


class Package:
    """All files, and the calls of all functions by name."""

    def __init__(self) -> None:
        paths = sorted(PACKAGE.rglob("*.py"))
        self.sources = {source.file: source for source in map(Source, paths)}
        self.errors = _error_classes(source.tree for source in self.sources.values())
        self.places = {
            node: source for source in self.sources.values() for node in source.functions
        }
        self.found: dict[tuple[str, Function, int], list[str]] = {}
        self.calls: dict[str, list[tuple[Source, list[Function], ast.Call]]] = defaultdict(list)
        for source in self.sources.values():
            for call, functions, _ in _calls(source.tree):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                self.calls[name].append((source, functions, call))

    def messages(self) -> list[Message]:
        """All messages, in the order of files and lines, each text once."""
        found: dict[str, Message] = {}
        for source in self.sources.values():
            for call, functions, names in _calls(source.tree):
                kind = self._kind(call, names)
                if kind and kind not in INTERNAL and call.args:
                    for text in self.texts(call.args[0], source, functions):
                        if re.search(r"[a-z]{2}.* ", re.sub(r"<[^>]*>", "", text)):
                            message = Message(kind, text, source.file, ".".join(names))
                            found.setdefault(text, message)
        for text in self._yielded():
            found.setdefault(text.text, text)
        return list(found.values())

    def _yielded(self) -> Iterator[Message]:
        """The reasons that make up an error about several settings, one by one."""
        source = self.sources["integrations/lightning/_checks"]
        for function in source.tree.body:
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Yield) and node.value is not None:
                        for text in self.texts(node.value, source, [function]):
                            yield Message("ValueError", text, source.file, function.name)

    def _kind(self, call: ast.Call, names: list[str]) -> str:
        """The class of the error or warning that a call makes; empty if it makes none."""
        name = ast.unparse(call.func)
        if name == "cls" and len(names) > 1 and names[-2] in self.errors:
            return names[-2]
        if name == "warnings.warn":
            category = [k.value for k in call.keywords if k.arg == "category"]
            return ast.unparse((call.args[1:2] or category or [ast.Name("UserWarning")])[0])
        if name == "kind":
            return "ValueError"
        return name if name in self.errors else ""

    def texts(
        self, node: ast.expr, source: Source, functions: list[Function], depth: int = 0
    ) -> list[str]:
        """The variants of a text, with placeholders for what is not known."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                return self._joined(values, source, functions, depth)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined([left, right], source, functions, depth)
            case ast.FormattedValue(value=value):
                return self.texts(value, source, functions, depth)
            case ast.IfExp(body=body, orelse=other):
                variants = [
                    *self.texts(body, source, functions, depth),
                    *self.texts(other, source, functions, depth),
                ]
                return list(dict.fromkeys(variants))
            case ast.Call(func=ast.Attribute(value=inner, attr="format")):
                return [
                    re.sub(r"\{(\w*)\}", lambda m: f"<{m[1] or 'reason'}>", text)
                    for text in self.texts(inner, source, functions, depth)
                ]
            case ast.Name(id=name):
                found = self._named(name, source, functions, depth)
                return found or [placeholder(node)]
        return [placeholder(node)]

    def _joined(
        self, parts: list[ast.expr], source: Source, functions: list[Function], depth: int
    ) -> list[str]:
        checks = source.file == "_foundation/checks"
        most = MOST_VARIANTS_OF_CHECKS if checks else MOST_VARIANTS
        variants = [self.texts(part, source, functions, depth) for part in parts]
        for part, found in zip(parts, variants, strict=True):
            if len(found) > most:
                found[:] = [placeholder(part)]
        while math.prod(map(len, variants)) > most:
            longest = max(range(len(variants)), key=lambda i: len(variants[i]))
            variants[longest] = [placeholder(parts[longest])]
        return ["".join(chosen) for chosen in itertools.product(*variants)]

    def _named(self, name: str, source: Source, functions: list[Function], depth: int) -> list[str]:
        """The texts that a name may stand for: of a constant, a variable, or a parameter."""
        if depth > 3 or name in ANY_VALUE:
            return []
        found: list[str] = []
        for number in range(len(functions), 0, -1):
            function = functions[number - 1]
            values = _assignments(function).get(name, [])
            for value in values:
                found += self.texts(value, source, functions[:number], depth + 1)
            if found or values:
                break
            arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            if name in [each.arg for each in arguments]:
                if name not in ANY_ARGUMENT:
                    found = self._passed(name, function, depth)
                break
        else:
            if name in source.constants:
                found = self.texts(source.constants[name], source, [], depth + 1)
            elif name in source.imported:
                module, original = source.imported[name]
                other = self.sources.get(module.replace(".", "/"))
                if other is not None and original in other.constants:
                    found = self.texts(other.constants[original], other, [], depth + 1)
        texts = [text for text in found if " " in text]
        if len(texts) < len(found):  # a value that is not known, or one word
            texts.append(f"<{name}>")
        return list(dict.fromkeys(texts))

    def _passed(self, name: str, function: Function, depth: int) -> list[str]:
        """The texts that callers pass for a parameter."""
        names = [each.arg for each in function.args.posonlyargs + function.args.args]
        if names[:1] in (["self"], ["cls"]):
            names = names[1:]
        key = (name, function, depth)
        if key in self.found:
            return self.found[key]
        found = self.found[key] = []  # empty meanwhile, for functions that call themselves
        if name in names[len(names) - len(function.args.defaults) :]:
            default = function.args.defaults[names.index(name) - len(names)]
            found += self.texts(default, self.places[function], [], depth + 1)
        calls = self.calls[function.name]
        if len(calls) > MOST_CALLS:  # such as __init__
            return found
        for source, functions, call in calls:
            given = [k.value for k in call.keywords if k.arg == name]
            if name in names[: len(call.args)]:
                given = [call.args[names.index(name)]]
            for value in given:
                found += self.texts(value, source, functions, depth + 1)
        return found


def placeholder(node: ast.expr) -> str:
    """A short name in angle brackets for what a message shows.

    >>> placeholder(ast.parse("type(closure).__name__", mode="eval").body)
    '<type>'
    >>> placeholder(ast.parse("tuple(self.x.shape)", mode="eval").body)
    '<shape>'
    """
    match node:
        case ast.FormattedValue(value=value):
            return placeholder(value)
        case ast.Name(id=name):
            return f"<{name.strip('_')}>"
        case ast.Attribute(attr="__name__", value=ast.Call(func=ast.Name(id="type"))):
            return "<type>"
        case ast.Attribute(attr="__name__" | "dtype" | "device" as attr, value=value):
            return f"<{attr}>" if attr != "__name__" else placeholder(value)
        case ast.Attribute(attr=attr):
            return f"<{attr.strip('_')}>"
        case ast.Call(func=ast.Attribute(attr="join"), args=[argument]):
            return placeholder(argument)
        case ast.Call(func=ast.Attribute(attr=name)):
            return f"<{name.strip('_')}>"
        case ast.Call(func=ast.Name(id="tuple" | "list" | "str" | "sorted" | "map"), args=args):
            return placeholder(args[-1])
        case ast.Call(func=ast.Name(id="len")):
            return "<number>"
        case ast.Call(func=ast.Name(id="type")):
            return "<type>"
        case ast.Call(func=ast.Name(id=name)):
            return f"<{name.strip('_')}>"
        case ast.Subscript(value=value):
            return placeholder(value)
        case ast.BinOp(left=left):
            return placeholder(left)
        case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt) | ast.Starred(value=elt):
            return placeholder(elt)
    return "<...>"


def _error_classes(trees: Iterator[ast.Module]) -> set[str]:
    """Names of Python's errors and of the package's own."""
    known = {
        name
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and known & set(map(ast.unparse, node.bases)):
                known.add(node.name)
    return known


def _calls(
    tree: ast.AST, functions: tuple[Function, ...] = (), names: tuple[str, ...] = ()
) -> Iterator[tuple[ast.Call, list[Function], list[str]]]:
    """All calls, with the functions around them and the names of functions and classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node, list(functions), list(names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _calls(node, (*functions, node), (*names, node.name))
        elif isinstance(node, ast.ClassDef):
            yield from _calls(node, functions, (*names, node.name))
        else:
            yield from _calls(node, functions, names)


@cache
def _assignments(function: Function) -> dict[str, list[ast.expr]]:
    """The values that a function gives to its variables, by name."""
    found: dict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found[target.id].append(node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and isinstance(node.target, ast.Name):
            found[node.target.id] += [node.value] if node.value else []
    return found
