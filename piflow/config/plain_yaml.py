"""YAML as recipes and values files have it: version 1.2's values, nothing twice, nothing endless.

PyYAML reads YAML 1.1, where ``yes`` is true, ``010`` is 8 and ``1:30`` is 90, and takes the last of
two equal keys. Here plain values are those of YAML 1.2's core schema, a key that stands twice is
refused with its lines, and size, depth and what aliases repeat are limited. Errors name the line
and don't quote it, since it may hold a password.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from piflow.config.section import RecipeError
from piflow.storage.foreign import shown

MAX_BYTES = 256 * 2**10
"""Of a file; a long recipe has 4 KB."""

MAX_DEPTH = 32

MAX_VALUES = 10_000
"""Values and keys, those that an alias repeats counted each time."""

_CORE = {  # tag -> the plain text that has it, and the characters that it may start with
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
    "merge": (re.compile(r"<<$"), ["<"]),
}
_MAX_DIGITS = 400  # of a number

_QUOTED = ("[", "{", '"', "'")  # what begins a value that is more than plain text


def load_mapping(content: bytes, *, where: str) -> dict[str, Any]:
    """A file's mapping of keys to plain values.

    Raises:
        RecipeError: it is too large, isn't UTF-8 or YAML, has a key twice, is too deep, repeats too
            much, or holds something else than a mapping; names `where` and the line.
    """
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{where} has more than {MAX_BYTES} bytes; at most so many are read")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    tree = _load(text, where)
    if tree is None:
        raise RecipeError(f"{where} is empty; expected a mapping of sections")
    if not isinstance(tree, dict):
        raise RecipeError(f"{where} must hold a mapping of sections, found {_kind(tree)}")
    return tree


def load_value(text: str, *, where: str) -> Any:
    """One value, as it stands behind a key; a plain one is taken to its end, ``#`` and all.

    Raises:
        RecipeError: as `load_mapping`; names `where`.
    """
    text = text.strip()
    if text.startswith(_QUOTED):
        value = _load(text, where)
        *_, last, _ = yaml.scan(text)
        if last.end_mark.index < len(text):
            problem = _marked("something follows the value; put all of it in quotes", last.end_mark)
            raise _refusal(problem, where)
        return value
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.YAMLError as error:
        raise _refusal(error, where) from None
    finally:
        loader.dispose()


def dump(tree: dict[str, Any]) -> str:
    """A tree of plain values as YAML that is read back as it is."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _marked(f"more than {MAX_DEPTH} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                raise _marked("a key must be plain text", key.start_mark)
            if name in seen:
                raise _marked(
                    f"key {shown(name)!r} stands twice, also in line {seen[name]}; leave one out",
                    key.start_mark,
                )
            seen[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise _marked(f"a number of {len(text)} digits", node.start_mark)
        if node.tag.endswith(":float"):
            return float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _starts) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _starts)
for _name in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _Loader.construct_number)


def _load(text: str, where: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)  # already here it looks for characters that YAML hasn't
        node = loader.get_single_node()
        if node is None:
            return None
        _require_few(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _refusal(error, where) from None
    except (ValueError, TypeError) as error:  # of a tag such as !!timestamp or !!int
        raise RecipeError(f"{where} is not valid YAML: {shown(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _require_few(root: Any) -> None:
    """Refuse a tree in which aliases repeat too much, without walking through all that they repeat.

    Nodes are finished before what holds them, so one pass counts each of them once.
    """
    sizes: dict[int, int] = {}
    open_: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        children = _children(node)
        if done:
            open_.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > MAX_VALUES:
                raise _marked(f"more than {MAX_VALUES} values, aliases counted", node.start_mark)
        elif id(node) in open_:
            raise _marked("an alias of what it stands in", node.start_mark)
        elif id(node) not in sizes:
            open_.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child in children if id(child) not in sizes]


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _marked(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)


def _refusal(error: yaml.YAMLError, where: str) -> RecipeError:
    if not isinstance(error, yaml.MarkedYAMLError):  # characters that YAML hasn't
        return RecipeError(f"{where} is not valid YAML: {shown(error)}")
    parts = []
    for text, mark in ((error.context, error.context_mark), (error.problem, error.problem_mark)):
        if text is not None:
            place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
            parts.append(f"{shown(text)}{place}")
    return RecipeError(f"{where} is not valid YAML: {', '.join(parts)}")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "plain text", bool: "true or false", int: "a number"}
    return names.get(type(value), type(value).__name__)
