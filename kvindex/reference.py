"""What can be configured, read from the schema itself: a page for the docs, an example file, and what is in effect."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec
import yaml
from msgspec import inspect as schema

from kvindex.config import Config, variable_of

_SECRET = re.compile(r"(api_key|password|secret|token|header)s?$")
_URL_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^/\s]+(?=@)")
_PAGE = re.compile(r"`docs/([a-z-]+\.md)`")
_HIDDEN = "***"


class Key(NamedTuple):
    """One key of the configuration."""

    name: str
    variable: str
    """In the environment; "" for keys of list entries, which are JSON there together."""
    takes: str
    """What it takes, in words."""
    default: Any
    """None where there is none; `msgspec.NODEFAULT` where it has to be given."""
    text: str
    """What it is for."""


class Section(NamedTuple):
    """A table of the file."""

    heading: str
    """As TOML has it: ``[http]``, ``[[pods]]``."""
    variable: str
    """For lists and maps, which are JSON in the environment; else ""."""
    text: str
    keys: list[Key]
    repeated: bool
    """Whether there are none of it unless somebody writes it."""


def sections() -> list[Section]:
    """Give all sections in the order of the file."""
    found: list[Section] = []
    for field in _struct(Config).fields:
        kind = field.type
        if isinstance(kind, schema.StructType):
            found.append(_section(kind, f"[{field.name}]", field.name))
            found += _nested(kind, field.name)
        else:
            entry = _entry(kind)
            found.append(_section(entry, f"[[{field.name}]]", "", variable_of(field.name)))
            found += _nested(entry, field.name)
    return found


def _nested(kind: schema.StructType, path: str) -> Iterator[Section]:
    for field in kind.fields:
        name = f"{path}.{field.name}"
        entry = _entry(field.type)
        variable = variable_of(*name.split(".")) if "." not in path and path != "pods" else ""
        if isinstance(field.type, schema.DictType) and isinstance(entry, schema.StructType):
            yield _section(entry, f"[{name}.NAME]", "", variable)
        elif isinstance(entry, schema.StructType):
            yield _section(entry, f"[[{name}]]", "", variable)


def _entry(kind: schema.Type) -> Any:  # noqa: ANN401  (a type, or None)
    if isinstance(kind, schema.ListType):
        return kind.item_type
    return kind.value_type if isinstance(kind, schema.DictType) else None


def _struct(cls: type) -> schema.StructType:
    kind = schema.type_info(cls)
    assert isinstance(kind, schema.StructType)  # noqa: S101  (our own classes)
    return kind


def _section(kind: schema.StructType, heading: str, path: str, variable: str = "") -> Section:
    said = _docstrings(kind.cls)
    keys = [
        Key(
            field.name,
            variable_of(path, field.name) if path else "",
            _takes(field.type),
            _default(field),
            said.get(field.name, ""),
        )
        for field in sorted(kind.fields, key=lambda field: not field.required)
    ]
    text = inspect.cleandoc(kind.cls.__doc__ or "")
    return Section(heading, variable, text, keys, repeated=not path)


def _default(field: schema.Field) -> Any:  # noqa: ANN401  (whatever the schema says)
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    # what may be left out has UNSET for its default, and that the schema does not call one
    return field.default if field.required or field.default is not msgspec.NODEFAULT else None


def _takes(kind: schema.Type) -> str:
    match kind:
        case schema.BoolType():
            return "true or false"
        case schema.IntType() | schema.FloatType():
            return ("integer" if isinstance(kind, schema.IntType) else "number") + _bounds(kind)
        case schema.StrType():
            return "text" + (", not empty" if kind.min_length else "")
        case schema.LiteralType():
            return _or([f"`{value}`" for value in kind.values])
        case schema.ListType():
            return "list of " + ("tables" if isinstance(kind.item_type, schema.StructType) else _takes(kind.item_type))
        case schema.DictType():
            return "table of " + (
                "tables" if isinstance(kind.value_type, schema.StructType) else _takes(kind.value_type)
            )
        case schema.UnionType():
            return _or([_takes(one) for one in kind.types if not isinstance(one, schema.NoneType)])
        case _:
            return "anything"


def _or(words: list[str]) -> str:
    last = f"; or {words[-1]}" if any(", " in word for word in words) else f" or {words[-1]}"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + last


def _bounds(kind: schema.IntType | schema.FloatType) -> str:
    if kind.gt is not None:
        low = f"above {kind.gt:,}"
        return f", {low}" + (f", at most {kind.le:,}" if kind.le is not None else "")
    if kind.ge is not None and kind.le is not None:
        return f", {kind.ge:,} to {kind.le:,}"
    return f", at least {kind.ge:,}" if kind.ge is not None else ""


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """Give what stands below each field of a class and of those that it builds on."""
    said: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if one.__module__.partition(".")[0] not in ("kvindex", "kvevents", "scorer", "indexer"):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)  # noqa: S101  (the source of a class)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                value = text.value.value if isinstance(text.value, ast.Constant) else ""
                said[field.target.id] = " ".join(str(value).split())
    return said


def markdown() -> str:
    """Give the page of documentation."""
    lines = [_INTRODUCTION]
    for section in sections():
        lines += ["", f"## `{section.heading}`", "", _linked(section.text)]
        if section.variable:
            lines += ["", f"In the environment `{section.variable}`, as JSON."]
        with_variables = not section.repeated
        lines += ["", "| key | takes | default |" + (" environment |" if with_variables else "") + " |"]
        lines += ["|---|---|---|---|" + ("---|" if with_variables else "")]
        for key in section.keys:
            variable = f" `{key.variable}` |" if with_variables else ""
            text = _linked(key.text).replace("|", "\\|")
            lines.append(f"| `{key.name}` | {key.takes} | {_shown(key.default)} |{variable} {text} |")
    return "\n".join(lines) + "\n"


def _linked(text: str) -> str:
    return _PAGE.sub(r"[\1](\1)", text.replace("``", "`"))


def _shown(default: Any) -> str:  # noqa: ANN401  (any default)
    if default is msgspec.NODEFAULT:
        return "**needed**"
    if default is None or default in ("", [], {}):
        return "none"
    if isinstance(default, int) and not isinstance(default, bool):
        return f"`{default}`" if default < 100_000 else f"{default:,}"
    return f"`{_toml(default)}`"


def _toml(value: Any) -> str:  # noqa: ANN401  (any default)
    return msgspec.json.encode(value).decode()


def example() -> str:
    """Give a TOML file in which every key stands with its default, commented out."""
    lines = ["# All that can be configured. What is commented out is the default, or an example of a list."]
    for section in sections():
        mark = "# " if section.repeated else ""
        lines += ["", *(f"# {line}" for line in section.text.splitlines() if line), f"{mark}{section.heading}"]
        for key in section.keys:
            if section.repeated and key.default is not msgspec.NODEFAULT:
                lines.append(f"#   {key.name}: {key.takes}. {key.text}".rstrip())
            elif key.default is msgspec.NODEFAULT:
                lines.append(f"#   {key.name}: {key.takes}, needed. {key.text}".rstrip())
            else:
                lines += textwrap.wrap(f"{key.takes}. {key.text}", 116, initial_indent="## ", subsequent_indent="## ")
                lines.append(f"# {key.name} = {_toml(key.default)}" if key.default is not None else f"# {key.name} =")
    return "\n".join(lines).replace("``", "`") + "\n"


def effective(config: Config) -> str:
    """Give what a configuration says, as YAML, without its secrets."""
    return yaml.safe_dump(_without_secrets(msgspec.to_builtins(config)), sort_keys=False, allow_unicode=True)


def _without_secrets(value: Any, name: str = "") -> Any:  # noqa: ANN401  (what YAML has)
    if isinstance(value, dict):
        # headers are called what the other side likes: all of them are hidden
        return {key: _without_secrets(one, name if name == "headers" else key) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_secrets(one, name) for one in value]
    if isinstance(value, str):
        return _HIDDEN if value and _SECRET.search(name) else _URL_PASSWORD.sub(rf"\1:{_HIDDEN}", value)
    return value


_INTRODUCTION = """\
# Configuration

<!-- made by `kvindex config --reference`: change the docstrings in kvindex/config.py, then `make reference` -->

`kvindex serve --config FILE` (or `KVINDEX_CONFIG`) reads one TOML or YAML file. Every key is an environment variable
too, which wins over the file; options of the command win over both. Keys that there are not and values that cannot be
used are refused at the start, with the key's path and what was expected.

```console
$ kvindex config --example > kvindex.toml    # every key with its default, commented out
$ kvindex config kvindex.toml                # what serve would run with, the environment included
index:
  url: memory://
  role: all
...
```

`kvindex config` says in one line what is wrong, with exit status 2, so that it can stand before a roll-out. Secrets are
not shown."""
