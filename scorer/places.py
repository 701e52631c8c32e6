"""Where the files of a model lie, among folders that somebody configured."""

from collections.abc import Sequence
from pathlib import Path

from scorer.errors import NoTokenizer

MAX_NAME = 256
"""Characters of a model's name that are looked for."""


def folder_of(model: str, folders: Sequence[Path]) -> Path:
    """Give the folder with the `tokenizer.json` of a model.

    In each folder, in order: ``FOLDER/<model>/`` (a name with an organisation is a folder in a folder), then the layout
    of the Hugging Face cache, ``FOLDER/models--<org>--<name>/snapshots/<revision>/``, also below ``FOLDER/hub/``. The
    revision is the one in ``refs/main``; where there is no such file, the only one.

    Names come from requests: one that would lead out of the folders leads nowhere. Raises `NoTokenizer`, which names
    the places looked at.
    """
    _check_name(model)
    looked: list[str] = []
    for folder in folders:
        plain = folder / model
        looked.append(str(plain / "tokenizer.json"))
        if _has_tokenizer(plain):
            return plain
        cached = "models--" + model.replace("/", "--")
        for cache in (folder / cached, folder / "hub" / cached):
            revision = _revision(cache)
            if revision is not None and _has_tokenizer(cache / "snapshots" / revision):
                return cache / "snapshots" / revision
            looked.append(str(cache / "snapshots" / (revision or "*") / "tokenizer.json"))
    raise NoTokenizer(f"model {model!r}: no tokenizer; {_where(looked)}")


def _where(looked: list[str]) -> str:
    if not looked:
        return "no folders are configured to look for one (tokenizers.folders)"
    return f"looked at {', '.join(looked)}"


def _check_name(model: str) -> None:
    parts = model.split("/")
    if len(model) > MAX_NAME or not all(map(_is_plain, parts)):
        raise NoTokenizer(
            f"model {model[:MAX_NAME]!r}: not a name that tokenizers are looked for by; expected NAME or "
            "ORGANISATION/NAME, or say where its tokenizer is (tokenizers.models)"
        )


def _is_plain(part: str) -> bool:
    """Whether a text is the name of something right inside a folder."""
    return part not in ("", ".", "..") and part.isprintable() and "\\" not in part


def _has_tokenizer(folder: Path) -> bool:
    try:
        return (folder / "tokenizer.json").is_file()
    except (OSError, ValueError):  # no permission, a name too long for the file system
        return False


def _revision(cache: Path) -> str | None:
    try:
        with (cache / "refs" / "main").open(encoding="ascii") as file:
            revision = file.read(MAX_NAME).strip()
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return None
    else:
        return revision if _is_plain(revision) and "/" not in revision else None
    try:
        names = [entry.name for entry in (cache / "snapshots").iterdir()]
    except (OSError, ValueError):
        return None
    return names[0] if len(names) == 1 else None
