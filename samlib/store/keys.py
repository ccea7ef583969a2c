"""Keys that name results by what decides them, their code included."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]  # of samlib
APART = "notebook"  # samlib's package whose code decides no result: it hands on values, which are in the keys


def key(value: Any) -> str:
    """32 hexadecimal digits that name a JSON-able value by its content."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def without_prose(source: str) -> str:
    """Python source without comments, layout and docstrings.

    Args:
        source: of a module.

    Raises:
        SyntaxError: it is no Python.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def code_of(fn: Callable[..., Any]) -> str:
    """A key of all the code that a function may run, so that no result is older than code that it used.

    That is the function itself, the functions, classes and plain values that it names (in a notebook they are cells of
    the page), and every module of samlib from which one of them comes, with those which these import. Comments, layout
    and docstrings do not count, nor does the package `notebook`.

    Args:
        fn: a function, a lambda, a class, or what functools.partial or a decorator made of one.

    Taught in: 01_why_merging_interferes.
    """
    parts: dict[str, str] = {}
    _follow(fn, parts)
    return key(parts)


def library() -> str:
    """A key of all of samlib's code."""
    return key({str(file.relative_to(ROOT)): _source(file) for file in sorted(ROOT.rglob("*.py"))})


def _follow(thing: Any, parts: dict[str, str]) -> None:
    """Add the code of a function, class or module, and of what it names, to `parts`, by name."""
    if hasattr(thing, "func") and hasattr(thing, "keywords"):  # functools.partial
        for one in (thing.func, *thing.args, *thing.keywords.values()):
            _follow(one, parts)
        return
    if isinstance(thing, ModuleType):
        parts |= _module(thing.__name__)
        return
    if not isinstance(thing, (FunctionType, type)):
        thing = getattr(thing, "__func__", None) or getattr(thing, "__wrapped__", None) or type(thing)
    thing = inspect.unwrap(thing)
    module = thing.__module__
    if module.split(".")[0] == "samlib":
        parts |= _module(module)
    elif not _installed(module):
        name = f"{module}.{thing.__qualname__}"
        if name not in parts:
            parts[name] = _own_source(thing)
            for other, value in _named(thing):
                if isinstance(value, (FunctionType, type, ModuleType)) or hasattr(value, "func"):
                    _follow(value, parts)
                else:
                    parts.setdefault(f"{name}: {other}", _plain(value))


def _named(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a function or class names: globals, what its closure holds, and defaults of its parameters."""
    functions = [thing] if isinstance(thing, FunctionType) else [f for f in vars(thing).values() if callable(f)]
    for function in functions:
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType):
            continue
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                yield name, function.__globals__[name]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield f"{function.__name__} defaults", (function.__defaults__, *(function.__kwdefaults__ or {}).items())


def _names(code: CodeType) -> set[str]:
    """Names that a function's code looks up, those of inner functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _plain(value: Any) -> str:
    """A constant as text, or nothing where it is none: what may change is what a result's parameters are for."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else ""


def _own_source(thing: Any) -> str:
    """Of a function or class outside of samlib, without prose; of a lambda its compiled code."""
    try:
        return without_prose(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        code = getattr(thing, "__code__", None)
        return repr(thing) if code is None else _compiled(code)


def _compiled(code: CodeType) -> str:
    constants = [_compiled(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr([code.co_code, code.co_names, code.co_varnames, constants])


def _installed(module: str) -> bool:
    """Whether a module belongs to Python or to an installed package, whose versions the stamps tell."""
    import sys

    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" or module not in sys.modules:
        return False
    return file is None or "site-packages" in file or file.startswith(sys.base_prefix)


def _module(name: str) -> dict[str, str]:
    """Sources of one of samlib's modules and of all that it imports, by module."""
    if name.split(".")[0] != "samlib":
        return {}
    found: dict[str, str] = {}
    todo = {name}
    while todo:
        one = todo.pop()
        file = _file(one)
        if file is None or one in found or one.split(".")[1:2] == [APART]:
            continue
        found[one] = _source(file)
        todo |= set(_imports(file))
    return found


def _file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def _imports(file: Path) -> tuple[str, ...]:
    """Modules of samlib that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "samlib":
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "samlib"]
    return tuple(name for name in found if name and _file(name))


@cache
def _source(file: Path) -> str:
    return without_prose(file.read_text("utf-8"))
