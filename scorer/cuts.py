r"""Where a text may be cut so that its parts, tokenized alone, give the ids of the whole.

A tokenizer of the `tokenizers` library works in stages: added tokens are found, the rest is normalized, cut into words
by the pre-tokenizer, and each word is tokenized by the model, alone. So a cut is safe where, whatever stands around it,

* no added token can reach over it, strip blanks across it or ask what stands on its other side,
* the normalizer changes neither side because of the other, and
* the pre-tokenizer always ends a word there, and nothing that it looks at lies on the other side.

The second and third are not worked out for regular expressions in general: they were, by hand, for the ones in `SPLITS`
(in none can a character that is no blank be followed by a space inside one match; nor a letter or digit by the marks in
`MARKS`; and the only look-ahead, `\s+(?!\S)`, never ends at such a place). Everything else is left alone:
`rule_of` then gives a reason instead of a rule.
"""

import json
import re
from typing import Any, NamedTuple, TypeAlias

from tokenizers import Tokenizer

Json: TypeAlias = dict[str, Any]

# The word patterns of GPT-2 (also inside `ByteLevel`), Llama 3, Qwen 2 and 3, Qwen 3.5, GPT-4o, and the three of
# DeepSeek V3, as their published tokenizer.json files have them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",
    rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_BLANKS}",
}
# Patterns that part some words further and leave the rest as it is: a cut needs one of the above beside them.
PARTIAL = {r"\p{N}{1,3}", r"\p{N}", "[一-龥぀-ゟ゠-ヿ]+"}  # noqa: RUF001 - as published

# Letters and digits of every version of Unicode that no normalization form C changes or joins with a mark of `MARKS`.
LETTERS = "A-Za-z0-9\u0410-\u044f\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
# What ends a word of LETTERS. Without the apostrophe (contractions) and the underscore (a letter to some).
MARKS = '\n!"#$%&()*+,-./:;<=>?@[\\]^`{|}~、。，！？；：'  # noqa: RUF001 - the full-width ones are meant
VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
PUNCTUATION = frozenset(c for c in VISIBLE if not c.isalnum())
# These work on each character alone, or join marks to the character before, and a space is none.
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}


class Rule(NamedTuple):
    """How the texts of one tokenizer are cut, and what goes round their ids."""

    cut: re.Pattern[str]
    """Matches begin where a cut is safe."""
    head: tuple[int, ...]
    """Ids that the post-processor puts first when special tokens are asked for."""
    tail: tuple[int, ...]
    """Ids that it puts last."""


def rule_of(tokenizer: Tokenizer) -> Rule | str:
    """The rule for a tokenizer, or the reason why its texts must not be cut."""
    try:
        normalizers = _stages(tokenizer.normalizer, "normalizers")
        words = _stages(tokenizer.pre_tokenizer, "pretokenizers")
        ends = _stages(tokenizer.post_processor, "processors")
    except Exception as error:  # noqa: BLE001 - parts written in Python cannot be described, and raise a bare Exception
        return f"a part of it cannot be described: {error}"
    kind = type(tokenizer.model).__name__
    if kind not in {"BPE", "WordPiece", "WordLevel"}:
        return f"a model of kind {kind} is not known to work on words"
    if kind == "BPE" and tokenizer.model.dropout:
        return "its merges are left to chance (dropout)"
    for stage in normalizers:
        if stage["type"] not in NORMALIZERS:
            return f"its normalizer {stage['type']} is not known to work on characters alone"
    wide = _marks_end_words(words)
    if isinstance(wide, str):
        return wide
    wide = wide and all(stage["type"] == "NFC" for stage in normalizers)
    cut = _pattern(tokenizer, wide=wide)
    if cut is None:
        return "one of its added tokens may reach over any cut"
    wrap = _wrap(ends)
    if wrap is None:
        return "its post-processor is not known"
    rule = Rule(re.compile(cut), *wrap)
    bare = tuple(tokenizer.encode("a b", add_special_tokens=False).ids)
    if (*rule.head, *bare, *rule.tail) != tuple(tokenizer.encode("a b").ids):
        return "its post-processor does other than it says"
    return rule


def _stages(part: Any, inside: str) -> list[Json]:  # noqa: ANN401 - normalizers, pre-tokenizers and post-processors share no base
    """What a part consists of, as tokenizer.json describes it, sequences within sequences laid flat."""
    return [] if part is None else _flat(json.loads(part.__getstate__()), inside)


def _flat(stage: Json, inside: str) -> list[Json]:
    if stage["type"] != "Sequence":
        return [stage]
    return [flat for each in stage[inside] for flat in _flat(each, inside)]


def _marks_end_words(stages: list[Json]) -> bool | str:
    """Whether marks end words as a space does, or why not even a space is certain to."""
    whole, wide = False, True
    if any(stage["type"] == "ByteLevel" for stage in stages[:-1]):
        return "something comes behind its ByteLevel, where a space is no longer a space"
    for stage in stages:
        kind = stage["type"]
        if kind == "ByteLevel":
            whole |= stage["use_regex"]
            # a part that begins with no space would be given one
            wide &= not stage["add_prefix_space"]
        elif kind == "Split":
            pattern = stage["pattern"].get("Regex")
            if pattern not in SPLITS | PARTIAL:
                return f"its words are split by a pattern that is not known: {stage['pattern']}"
            if (stage["behavior"], stage["invert"]) != ("Isolated", False) and (
                pattern in PARTIAL or (stage["behavior"], stage["invert"]) != ("Removed", True)
            ):
                return f"its words are split in a way that is not known: {stage['behavior']}"
            whole |= pattern in SPLITS
        elif kind in {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}:
            whole, wide = True, False
        elif kind != "Digits":
            return f"its pre-tokenizer {kind} is not known to end words at spaces"
    return wide if whole else "nothing in its pre-tokenizer is known to end words at spaces"


def _pattern(tokenizer: Tokenizer, *, wide: bool) -> str | None:
    """The expression for safe places beside this tokenizer's added tokens; None where one of them allows no cut."""
    inside, before = set[str](), set[str]()
    for token in tokenizer.get_added_tokens_decoder().values():
        forms = {token.content}
        if tokenizer.normalizer is not None:
            forms.add(tokenizer.normalizer.normalize_str(token.content))
        # a token reaches over a cut only if it has the character behind the cut anywhere but in front
        inside.update(*(form[1:] for form in forms))
        if token.single_word or " " in inside:
            return None
        if token.rstrip:
            # no cut right behind it: the blanks that follow are its own
            last = token.content[-1:]
            if last not in PUNCTUATION:
                return None
            before.add(last)
    barred = "".join(map(re.escape, sorted(before)))
    if not wide:
        return f"(?<=[{''.join(re.escape(c) for c in VISIBLE if c not in before)}]) "
    marks = "".join(re.escape(mark) for mark in MARKS if mark not in inside)
    # U+180E was a blank to early versions of Unicode
    space = rf"(?<=[^\s\u180e{barred}]) "
    return f"{space}|(?<=[{LETTERS}])[{marks}]" if marks else space


def _wrap(stages: list[Json]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids that a post-processor puts before and behind a text, None where it is not one that only does that."""
    around = [stage for stage in stages if stage["type"] != "ByteLevel"]
    if not around:
        return (), ()
    stage = around[0]
    if len(around) > 1 or stage["type"] not in {"TemplateProcessing", "BertProcessing", "RobertaProcessing"}:
        return None
    if stage["type"] != "TemplateProcessing":
        return (stage["cls"][1],), (stage["sep"][1],)
    sides: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in stage["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            sides[texts > 0].extend(stage["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return (tuple(sides[0]), tuple(sides[1])) if texts == 1 else None
