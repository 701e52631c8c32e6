"""The process in which chat templates run: one JSON line in, one JSON line out, until stdin ends.

A template is a program by somebody else. The sandbox keeps it from files and from Python's insides, but no check inside
a process bounds what an expression may take: `'a' * 10**9`, or a list that holds itself twice forty times over, is one
step. So the kernel bounds it: address space by RLIMIT_AS, processor time by a timer whose signal ends the process.
`scorer.rendering` starts another one then. Nothing but jinja2 and the standard library is imported here.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(Extension):
    """`{% generation %}`: marks what the model wrote, for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # a call block, so that what is set inside stays inside, as in transformers
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:  # noqa: ANN401  (a jinja2 macro)
        return caller()


class _Dict:
    """`dict(...)` without the class, whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: ANN401
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace that keeps no names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (so that `self=` is a name like any other)
        values: dict[str, Any] = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: a name must not begin with an underscore: {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005  (templates mean the server's own time)


def _tojson(
    value: Any,  # noqa: ANN401
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  (templates call it so)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # jinja2's own escapes what HTML would mind
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    # as transformers makes it (utils/chat_template_utils.py), whose output this has to equal byte for byte
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    names = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    made.globals.update(names, dict=_Dict(), namespace=_Namespace)
    return made


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=128)
def wants_parts(template: str) -> bool:
    """Say whether a template goes through the parts of a message's content itself, so that they must not be joined.

    Decided as vLLM does (renderers/hf.py, `--chat-template-content-format auto`), also where that is rough: there is a
    loop over the content of what loops over the messages, or over something called `content`. Where targets of loops
    and assignments are no plain names vLLM gives up, and joins.
    """
    tree = _environment().parse(template)
    assigned = list(tree.find_all(nodes.Assign))
    loops = list(tree.find_all(nodes.For))
    messages, grown = {"messages"}, True
    while grown:
        grown = False
        for each in assigned:
            if any(_reads(each.node, name) for name in messages):
                if not isinstance(each.target, nodes.Name):
                    return False
                grown |= each.target.name not in messages
                messages.add(each.target.name)
    message = set[str]()
    for loop in loops:
        if any(_reads(loop.iter, name) for name in messages):
            if not isinstance(loop.target, nodes.Name):
                return False
            message.add(loop.target.name)
    for loop in loops:
        bare = isinstance(loop.iter, nodes.Name) and loop.iter.name == "content"
        if bare or any(_reads(loop.iter, name, "content") for name in message):
            return isinstance(loop.target, nodes.Name)
    return False


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether an expression is a variable, or one entry of it, behind filters, tests and slices."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key is not None:
        if isinstance(node, nodes.Getattr):
            found: object = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            found = node.arg.value
        else:
            return False
        if found != key:
            return False
        node = node.node
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def render(template: str, variables: dict[str, Any], max_chars: int) -> str:
    """Give what a template makes of some variables. Raises `OverflowError` above so many characters."""
    pieces, length = [], 0
    for piece in _compiled(template).generate(variables):
        length += len(piece)
        if length > max_chars:
            raise OverflowError
        pieces.append(piece)
    return "".join(pieces)


def _answer(line: bytes, max_chars: int) -> dict[str, Any]:
    try:
        asked = json.loads(line)
        template = asked["template"]
        if "variables" in asked:
            return {"text": render(template, asked["variables"], max_chars)}
        return {"parts": wants_parts(template)}
    except MemoryError:
        return {"error": "took more memory than it may"}
    except OverflowError:
        return {"error": f"wrote more than {max_chars} characters"}
    except RecursionError:
        return {"error": "is nested too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # noqa: BLE001  (a template may raise anything)
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def _lines() -> Iterator[bytes]:
    with contextlib.suppress(KeyboardInterrupt):
        yield from sys.stdin.buffer


def main(max_seconds: float, max_bytes: int, max_chars: int) -> None:
    """Answer until stdin ends."""
    # a terminal's Ctrl-C is for the program that started this one, which then closes stdin
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    _environment()
    for line in _lines():
        signal.setitimer(signal.ITIMER_PROF, max_seconds)
        answer = _answer(line, max_chars)
        try:
            data = json.dumps(answer).encode()
        except MemoryError:
            data = b'{"error": "took more memory than it may"}'
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(data + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
