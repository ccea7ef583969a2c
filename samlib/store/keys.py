"""Keys that name results by what decides them, their code included.

Of samlib whole modules count, as they were when this one was imported: that is the code which runs until Python is
started again. Of a notebook, or of modules of the reader's own, the compiled code counts. Installed packages do not;
stamps tell their versions.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from numbers import Number
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]  # of samlib
APART = "samlib.notebook"  # the package whose code decides no result: it hands on values, which are in the keys, and
HANDED = "samlib.model.clip"  # the model
HELD = ("func", "args", "keywords", "__func__", "__self__", "__wrapped__", "fget", "fset", "fdel")  # by what wraps
PROSE = {"__doc__", "__firstlineno__", "__static_attributes__"}  # names in the body of a class that decide nothing
OUTSIDE = PROSE | {"__module__", "__dict__", "__weakref__", "__builtins__", "__file__", "__cached__", "__spec__"}


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
    and docstrings do not count, nor does the package `notebook`. Tensors and other objects that a function names do
    not count: they belong to a result's parameters.

    Args:
        fn: a function, a lambda, a class, or what functools.partial or a decorator made of one.

    Raises:
        RuntimeError: a module of samlib is no longer the one that runs.

    Taught in: 01_why_merging_interferes.
    """
    modules: set[str] = set()
    trace = list(_trace(fn, {}, modules))
    return key([trace, {name: _running(name) for name in _with_imports(modules)}])


def library(root: Path = ROOT) -> str:
    """A key of all of samlib's code as it is on the disk now, for what runs in processes of its own.

    Args:
        root: folder of samlib.
    """
    return key({name: without_prose(text) for name, (_, text) in _texts(root).items()})


# Objects


def _trace(value: Any, seen: dict[int, int], modules: set[str], above: tuple[int, ...] = ()) -> Iterator[str]:
    """A value in words: what it is, where it comes from and what it holds.

    Args:
        value: anything.
        seen: numbers of the functions, classes and modules so far, by id.
        modules: samlib's modules that are met are added.
        above: ids of what holds the value.
    """
    plain, lasting = _plain(value), isinstance(value, (FunctionType, type, ModuleType))
    if plain is not None or id(value) in seen or id(value) in above:
        yield plain or f"number {seen.get(id(value))}"
        return
    if lasting:
        seen[id(value)] = len(seen)
    module = _home(value)
    if _of_samlib(module):
        modules.add(module)
    yield _label(value)
    for name, held in _held(value, own=not (_of_samlib(module) or _installed(module))):
        yield name
        yield from _trace(held, seen, modules, (*above, id(value)))


def _plain(value: Any) -> str | None:
    """A value in text if it is a plain one."""
    if isinstance(value, (bytes, Number)):
        return repr(value)
    try:
        return json.dumps(sorted(value) if isinstance(value, (set, frozenset)) else value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None


def _home(value: Any) -> str:
    """The module that an object comes from: of a function that of its code, whatever a decorator says."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__"))
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _label(value: Any) -> str:
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{type(value).__qualname__} {_home(value)}.{name}"


def _held(value: Any, own: bool) -> Iterator[tuple[str, Any]]:
    """What an object holds that may be run, by name; of the reader's own objects plain values, too."""
    held: Iterable[tuple[str, Any]] = ()
    if isinstance(value, (dict, MappingProxyType)):
        held = ((repr(name), one) for name, one in value.items())
    elif isinstance(value, (set, frozenset)):
        held = (("", one) for one in sorted(value, key=_label))
    elif isinstance(value, (list, tuple)):
        held = (("", one) for one in value)
    elif isinstance(value, ModuleType):
        held = vars(value).items() if own else ()
    elif isinstance(value, type):
        held = [("bases", value.__bases__), *vars(value).items()] if own else ()
    else:
        wraps = [name for name in HELD if hasattr(type(value), name) or name in _state(value)]
        yield from ((name, getattr(value, name)) for name in wraps)
        if isinstance(value, FunctionType):
            held = ((name, one) for name, one in _of_function(value, own) if own or _plain(one) is None)
        elif own:
            held = [("class", type(value)), *_state(value).items()]
        elif _of_samlib(_home(value)):  # it may fill itself as it is used: only functions were there from the beginning
            held = [item for item in _state(value).items() if isinstance(item[1], (FunctionType, partial))]
    yield from ((name, one) for name, one in held if name not in OUTSIDE)


def _state(value: Any) -> dict[str, Any]:
    """Attributes of an instance."""
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name))
    return {name: getattr(value, name) for name in slots if name != "__dict__"} | getattr(value, "__dict__", {})


def _of_function(function: FunctionType, own: bool) -> Iterator[tuple[str, Any]]:
    code, names = function.__code__, function.__globals__
    if own:
        yield "code", _compiled(code)
        yield from ((name, names[name]) for name in sorted(_looked_up(code)) if name in names)
        yield from _imported(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    yield "defaults", [function.__defaults__, function.__kwdefaults__]


# Compiled code


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and classes in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _compiled(code: CodeType) -> list[Any]:
    """What a function's code does: of comments, docstrings and places of lines nothing is left."""
    steps: list[Any] = []
    for step in dis.get_instructions(code):
        value = step.argval
        if step.opname == "STORE_NAME" and value in PROSE:
            steps.pop()  # its value
        elif isinstance(value, CodeType):
            steps.append([step.opname, _compiled(value)])
        else:
            steps.append([step.opname, sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)])
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 12]  # 12: * and **
    return [steps, counts, code.co_varnames, getattr(code, "co_exceptiontable", b"").hex()]


def _looked_up(code: CodeType) -> set[str]:
    """Global names that a function's code looks up."""
    steps = (step for one in _codes(code) for step in dis.get_instructions(one))
    return {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _imported(code: CodeType) -> Iterator[tuple[str, Any]]:
    """What a function imports when it runs, but for installed packages."""
    for one in _codes(code):
        found: dict[str, set[str]] = {}
        module = ""
        for step in dis.get_instructions(one):
            if step.opname == "IMPORT_NAME":
                module = step.argval
                found.setdefault(module, set())
            elif step.opname == "IMPORT_FROM":
                found[module].add(step.argval)
        for module, names in found.items():
            if not _installed(module):
                loaded = importlib.import_module(module)
                yield from ((f"{module} {name}", getattr(loaded, name, loaded)) for name in sorted(names) or [""])


# Modules


def _of_samlib(module: str) -> bool:
    return module.split(".")[0] == "samlib"


@cache
def _installed(module: str) -> bool:
    """Whether a module belongs to Python or to an installed package."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or top == "__main__":
        return top != "__main__"
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a file
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
    return any({"site-packages", "dist-packages"} & {*Path(place).parts} for place in places)


def _texts(root: Path) -> dict[str, tuple[Path, str]]:
    """The files below samlib's folder and what is in them, by module."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(("samlib", *(part for part in parts if part != "__init__")))
        found[name] = file, file.read_text("utf-8")
    return found


_TEXTS = _texts(ROOT)


def _running(module: str) -> str:
    """A key of the code of one of samlib's modules.

    Raises:
        RuntimeError: its file has other code now.
    """
    file, text = _TEXTS[module]
    try:
        same = file.read_text("utf-8") == text or without_prose(file.read_text("utf-8")) == without_prose(text)
    except (OSError, SyntaxError):
        same = False
    if not same:
        raise RuntimeError(
            f"{file} has changed since it was loaded: restart Python, so that what runs is what is there"
        )
    return _without_prose(module)


@cache
def _without_prose(module: str) -> str:
    return key(without_prose(_TEXTS[module][1]))


def _with_imports(modules: Collection[str]) -> list[str]:
    """Modules of samlib and all that they import, sorted; in place of a package all that is in it."""
    found: set[str] = set()
    todo = set(modules)
    while todo:
        one = todo.pop()
        if f"{one}.".startswith(f"{APART}."):
            one = HANDED
        if one in found:
            continue
        if one not in _TEXTS:
            raise RuntimeError(f"{one} is newer than what is loaded of samlib: restart Python")
        found.add(one)
        todo |= _imports(one)
        if _TEXTS[one][0].name == "__init__.py":
            todo |= {name for name in _TEXTS if name.startswith(f"{one}.")}
    return sorted(found)


@cache
def _imports(module: str) -> set[str]:
    """Modules of samlib that one of them imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(_TEXTS[module][1])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in _TEXTS else node.module for one, name in inside.items() if one[:2] != "__"}
    return {name for name in found if _of_samlib(name)}
