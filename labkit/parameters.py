"""A notebook's parameters: their names and types, read from its `parameters` cell."""

import ast
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from labkit.errors import RunError

if TYPE_CHECKING:
    from nbformat import NotebookNode

# What an annotation in a parameters cell may be made of; any other is taken from the default.
TYPE_NAMES = {t.__name__: t for t in (int, float, str, bool, list, dict)}
TYPE_NAMES |= {"Optional": Optional, "Union": Union, "Literal": Literal, "Any": Any}

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list, as JSON",
    dict: "an object, as JSON",
    NoneType: "none",
}
UNKNOWN = object()


class Text(str):
    """A value as typed on a command line: read by the type of the parameter it is for."""


@dataclass(frozen=True)
class Parameter:
    """One assignment of a parameters cell; `kind` is its type, Any where nothing tells."""

    name: str
    kind: Any
    default: str

    @cached_property
    def _checker(self) -> TypeAdapter:
        return TypeAdapter(self.kind, config=ConfigDict(strict=True))

    def accept(self, value: object) -> object:
        """The value as the notebook will get it; raises ValueError where the type is wrong."""
        if isinstance(value, Text):
            readings = _readings(value) + [self._located(value)]
        else:
            readings = [_plain(value)]
        for reading in readings:
            try:
                return self._checker.validate_python(reading)
            except ValidationError:
                continue
        raise ValueError(value)

    def _located(self, text: str) -> str:
        """The text; made absolute where it is a path here, as notebooks run in their own folder."""
        if "\0" in text:  # in no path, and expanduser raises for it
            return str(text)
        path = os.path.expanduser(text)  # pathlib's raises for ~nobody, and for long texts
        is_path = os.path.exists(path) if os.sep in text else os.path.isdir(path)
        keeps = text.strip(".~") == "" or repr(str(text)) == self.default
        return os.path.realpath(path) if is_path and not keeps else str(text)


def read(notebook: "NotebookNode", name: str) -> dict[str, Parameter]:
    """The parameters that a notebook called `name` takes; none without a tagged cell.

    Read from the syntax tree: papermill's own inspection goes by regular expressions, which
    lose `X: int | None = None` and texts that hold an equals sign.
    """
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if not cells:
        return {}
    try:
        tree = ast.parse(cells[0].source)
    except SyntaxError as error:
        raise RunError(
            f"The parameters cell of {name} is not plain Python.",
            f"Line {error.lineno}: {error.msg}.",
            "Keep that cell to assignments of literals, such as MAX_MODEL_LEN = 1024.",
        ) from None
    found = (parameter for statement in tree.body for parameter in _assigned(statement))
    return {parameter.name: parameter for parameter in found}


def share_out(
    values: Mapping[str, object], notebooks: Mapping[str, Mapping[str, Parameter]]
) -> dict[str, dict[str, object]]:
    """Which notebook gets which values: each gets those that it has a parameter for.

    `notebooks` maps a notebook's name to its parameters. Raises RunError for a value that no
    notebook takes, or that one of them takes in another type.
    """
    known = {name for taken in notebooks.values() for name in taken}
    for name in values:
        if name not in known:
            raise _unknown(name, known, notebooks)
    return {
        notebook: {n: _accept(taken[n], v, notebook) for n, v in values.items() if n in taken}
        for notebook, taken in notebooks.items()
    }


def in_words(kind: Any) -> str:
    """A type as a learner would say it, such as "a whole number or none"."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, get_args(kind)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    return WORDS.get(origin or kind, str(kind))


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that `name` may be a misspelling of, nearest first."""
    by_lower = {each.lower(): each for each in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]


def _assigned(statement: ast.stmt) -> list[Parameter]:
    """The parameters that one statement of the cell sets."""
    if isinstance(statement, ast.AnnAssign) and statement.value:
        targets, annotation = [statement.target], statement.annotation
    elif isinstance(statement, ast.Assign):
        targets, annotation = statement.targets, None
    else:
        return []
    kind, default = _kind(annotation, statement.value), ast.unparse(statement.value)
    return [Parameter(t.id, kind, default) for t in targets if isinstance(t, ast.Name)]


def _kind(annotation: ast.expr | None, default: ast.expr) -> Any:
    """The type an annotation names, else the type of the default, else Any."""
    if annotation is not None:
        code = compile(ast.Expression(annotation), "<annotation>", "eval")
        try:
            kind = eval(code, {"__builtins__": {}}, TYPE_NAMES)  # only these names
            TypeAdapter(kind)
            return kind
        except (NameError, TypeError, AttributeError, PydanticUserError):
            pass
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return Any
    if isinstance(value, tuple):
        return list  # papermill has no tuples
    return type(value) if type(value) in TYPE_NAMES.values() else Any


def _plain(value: object) -> object:
    """The value without what papermill cannot write into a notebook: paths and tuples."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def _readings(text: str) -> list[object]:
    """What a text from a command line may mean besides itself, most special first."""
    lower = text.strip().lower()
    if lower in ("none", "null"):
        return [None]
    if lower in ("true", "false"):
        return [lower == "true"]
    meanings = [_read(json.loads, text), _read(ast.literal_eval, text)]
    # A text stays as it was typed, quotes and all.
    return [m for m in meanings if m is not UNKNOWN and not isinstance(m, str)]


def _read(reader: Any, text: str) -> object:
    try:
        return reader(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return UNKNOWN


def _accept(parameter: Parameter, value: object, notebook: str) -> object:
    try:
        return parameter.accept(value)
    except ValueError:
        raise RunError(
            f"{parameter.name} of {notebook} takes {in_words(parameter.kind)}, not {str(value)!r}.",
            f"Its default is {parameter.default}.",
            f"Give it another value: -p {parameter.name} VALUE.",
        ) from None


def _unknown(name: str, known: set[str], notebooks: Iterable[str]) -> RunError:
    guesses = nearest(name, known)
    takers = ", ".join(notebooks)
    have = f"{takers} takes: {', '.join(sorted(known))}." if known else f"{takers} takes none."
    return RunError(
        f"There is no parameter {name}.",
        have,
        f"Did you mean {guesses[0]}?" if guesses else "Choose one of these, or leave it out.",
    )
