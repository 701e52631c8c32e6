"""Pages of documentation taken apart: their blocks, commands, links and headings."""

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"^( *)(```+)(.*)$")
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_NAMED = re.compile(r"# ((?:[\w-]+/)*[\w.-]+\.(?:toml|ya?ml|json|py|sh))(?:\s|$)")
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")


class Wrong(AssertionError):
    """Something on a page does not hold."""


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    line: int
    """Where its text begins in the page."""

    @property
    def file(self) -> str:
        """The file that the reader is told to save it as: its first line is a comment with a name alone."""
        found = _NAMED.match(self.text)
        return found[1] if found else ""


class Command(NamedTuple):
    """A command and what the page says that it prints."""

    text: str
    output: str
    line: int


class Page(NamedTuple):
    """A page, its blocks apart from its prose."""

    path: Path
    prose: str
    """Without the blocks; as many lines as the page has."""
    blocks: list[Block]

    def inline(self) -> list[str]:
        """What stands in backticks."""
        return [" ".join(text.split()) for text in _INLINE.findall(self.prose)]

    def links(self) -> list[str]:
        """Where links and pictures lead."""
        return _LINK.findall(re.sub(_INLINE, "", self.prose))

    def anchors(self) -> set[str]:
        """The names that headings can be linked by."""
        seen: Counter[str] = Counter()
        found = set()
        for heading in re.findall(r"^#{1,6} +(.+?) *#*$", self.prose, re.MULTILINE):
            name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
            name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
            found.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
        return found


def read_page(path: Path) -> Page:
    """Take a page apart. Raises `ValueError` for a block that does not end."""
    prose: list[str] = []
    blocks: list[Block] = []
    begun: tuple[str, str, str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if begun is None and fence:
            begun, inside = (fence[1], fence[2], fence[3].strip(), number + 1), []
        elif begun is not None and fence and len(fence[2]) >= len(begun[1]) and not fence[3]:
            blocks.append(Block(begun[2], "\n".join(inside) + "\n", begun[3]))
            begun = None
        elif begun is not None:
            inside.append(line.removeprefix(begun[0]))
        prose.append("" if begun or fence else line)
    if begun is not None:
        raise ValueError(f"{path}:{begun[3]}: the block does not end")
    return Page(path, "\n".join(prose) + "\n", blocks)


def commands_of(block: Block) -> list[Command]:
    """Give the commands of a block: after ``$ `` in ``console``, else every line.

    A command goes on while a quotation or a here-document is open, or after a backslash. Raises `ValueError` for one
    that never ends, and for output before the first command.
    """
    prompt = "$ " if block.language == "console" else ""
    found: list[Command] = []
    lines = block.text.splitlines()
    place = 0
    while place < len(lines):
        line, first = lines[place], place
        place += 1
        if not line.startswith(prompt) or (not prompt and not line.strip()):
            if line.strip() and not found:
                raise ValueError(f"line {block.line + first}: output before any command")
            if found:
                found[-1] = found[-1]._replace(output=found[-1].output + line + "\n")
            continue
        text = line.removeprefix(prompt)
        while _goes_on(text):
            if place == len(lines):
                raise ValueError(f"line {block.line + first}: the command does not end: {text}")
            text += "\n" + lines[place]
            place += 1
        found.append(Command(text, "", block.line + first))
    return found


def _goes_on(text: str) -> bool:
    if text.endswith("\\"):
        return True
    here = _HEREDOC.search(text)
    if here:
        return here[1] not in text.splitlines()[1:]
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def words_of(command: str) -> list[str]:
    """Give the words of a command, without assignments before it and without what it is piped into."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        words = words[1:]
    ends = [words.index(end) for end in ("|", "&", "&&", ">", ";", "||") if end in words]
    return words[: min(ends)] if ends else words


def same_output(said: str, printed: str) -> bool:
    """Say whether a program printed what a page says: blanks do not count, and ``...`` stands for anything."""
    pieces = [r"\s*".join(map(re.escape, piece.split())) for piece in said.split("...")]
    pattern = r"\s*" + r"[\s\S]*".join(rf"\s*{piece}\s*" for piece in pieces) + r"\s*"
    return re.fullmatch(pattern, printed) is not None
