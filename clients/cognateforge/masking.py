"""Hides secrets in texts that are kept or sent: known values, passwords in URLs, and what looks like a secret.

A secret is replaced by as many asterisks as it has bytes, so that whatever stands behind it keeps its place.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

# scheme://user:PASSWORD@host
_IN_URL = re.compile(rb"(?<=://)([^\s:/@]*:)([^\s/@]+)(?=@)")
# A tokenizer is none.
_NAMED_SECRET = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|API[_-]?KEY|ACCESS[_-]?KEY|PRIVATE[_-]?KEY$|CREDENTIAL",
    re.IGNORECASE,
)
# A shorter value would hide words of every text.
_SHORTEST_CHARS = 8
# A secret that lies across the border of two parts is found by this much of overlap; no longer one is looked for.
LONGEST_BYTES = 1024


class Mask:
    """Replaces secrets by asterisks."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        """values: secrets as they are; those that are too short or too long to be told from other text are left."""
        known = {
            value.encode() for value in values if len(value) >= _SHORTEST_CHARS and len(value.encode()) <= LONGEST_BYTES
        }
        # The longest first: one may be a part of another.
        ordered = sorted(known, key=lambda value: (-len(value), value))
        self._known = re.compile(b"|".join(map(re.escape, ordered))) if ordered else None

    def data(self, text: bytes) -> bytes:
        """Return the bytes with every secret hidden; their number stays."""
        if self._known is not None:
            text = self._known.sub(lambda found: b"*" * len(found[0]), text)
        return _IN_URL.sub(lambda found: found[1] + b"*" * len(found[2]), text)

    def text(self, text: str) -> str:
        """Return the text with every secret hidden."""
        return self.data(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret."""
    return _NAMED_SECRET.search(name) is not None


def secrets_of_environment(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the values of the variables whose names speak of secrets."""
    variables = os.environ if environment is None else environment
    return [value for name, value in variables.items() if is_secret_name(name)]


_KEY_MARK = re.compile(r"-----(BEGIN|END) [A-Z0-9 ]{0,40}PRIVATE KEY-----")
# What a key's lines are made of, also where a line's end is written as two characters.
_KEY_BODY = re.compile(r"(?:\\[nr]|[A-Za-z0-9+/=\s])*")
_LINE_END = re.compile(r"(\n|\\n)")
# More than the lines of the largest keys that are used.
_KEY_CHARS = 8192
# What is a secret by its form, wherever it stands. Repetitions have bounds: a hostile line must not take hours.
_FORMS = (
    re.compile(r"\beyJ[\w-]{8,2000}\.[\w-]{8,4000}(?:\.[\w-]{0,2000})?"),  # a JSON web token
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),  # Amazon's key ids
    re.compile(r"\b(?:gh[pousr]|github_pat|glpat|hf|sk|xox[abprs])[_-][\w-]{16,}"),  # what well-known services issue
)
_HEADER = re.compile(r"(?i)\b(bearer\s{1,8}|authorization\W{1,6}(?:b\W)?(?:\w{1,32}\s{1,8})?)([\w.~+/=-]{8,})")
# A parameter in a URL, whose names are shorter: there `sig` and `key` are no other words.
_IN_QUERY = re.compile(r"""(?<=[?&;])([\w.~%-]{1,128})=([^\s&;#"'<>\\]+)""")
_QUERY_SECRET = re.compile(r"sig|signature|x-[a-z]{1,8}-signature|key|auth|pwd|pass|code", re.IGNORECASE)
# Paths that are the secret themselves, of services that take messages.
_HOOK = re.compile(r"(?<=://)(hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/)([\w/-]+)")
_COOKIE = re.compile(r"(?i)\b((?:set-)?cookie[\"']?\s{0,8}:\s{0,8})([^\n]+)")
# An option of a command line and its value; what is shorter is a word of a sentence.
_OPTION = re.compile(r"""(?<![\w-])(--?[\w-]{1,128})(["']?,?\s{1,8}["']?)([^\s"',-][^\s"',]{7,})""")
_USER = re.compile(r"(?<![\w-])((?:-u|--user)[\s=]{1,8}[^\s:]{1,256}:)(\S+)")
# A pair of texts, as headers and items are printed.
_PAIR = re.compile(r"""(?<=["'])([\w.-]{1,128})(["'],\s{0,8}b?["'])([^"'\\\n]+)""")
# An object on one line whose name is that of a secret.
_NESTED = re.compile(r"""(?<![\w.-])([\w.-]{1,128})(["']?\s{0,8}[:=]\s{0,8}\{)([^{}\n]+)""")
# name = value, in files of settings, in environments and in printed objects. What is quoted may hold blanks.
_ASSIGNED = re.compile(
    r"""(?<![\w.-])([\w.-]{1,128})((?:\\*["'])?\s{0,8}[:=]\s{0,8}(?:\\*["'])?)"""
    r"""((?<=[^\\]")(?:[^"\\\n]|\\.)+|(?<=")[^"\\\n]+|(?<=')[^'\\\n]+|(?!\{["'\s*])[^\s"',;&}\])\\]+)"""
)
_HARMLESS = re.compile(r"[-+]?\d{1,7}(\.\d+)?|null|none|true|false|\*+", re.IGNORECASE)
# Tokens are what a model reads, too: those are counted.
_COUNT = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)


class Redactor:
    """Hides secrets in what leaves a machine: known ones, what is named like one, and what has the form of one.

    It rather hides too much: what it leaves is read by others.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        """values: secrets as they are."""
        known = list(values)
        self._mask = Mask([*known, *(form for value in known for form in _encoded(value))])

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        return self._mask.text("".join(map(_without_forms, _without_keys(text).splitlines(keepends=True))))

    def plain(self, value: Any, *, name: str = "") -> Any:
        """Return a JSON value without secrets. name: that of the value."""
        if isinstance(value, Mapping):
            # What is below a secret's name is the secret.
            above = f"{name}." if is_secret_name(name) and "tokens" not in name.lower() else ""
            return {self.text(str(key)): self.plain(item, name=f"{above}{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(item, name=name) for item in value]
        if not isinstance(value, str):
            return value
        return "*" * len(value) if _is_secret(name, value) else self.text(value)


def _without_forms(line: str) -> str:
    for form in _FORMS:
        line = form.sub(lambda found: "*" * len(found[0]), line)
    line = _HOOK.sub(lambda found: found[1] + "*" * len(found[2]), line)
    line = _COOKIE.sub(lambda found: found[1] + "*" * len(found[2]), line)
    line = _USER.sub(lambda found: found[1] + "*" * len(found[2]), line)
    line = _IN_QUERY.sub(_in_query, line)
    line = _NESTED.sub(_below_name, line)
    for form in (_OPTION, _PAIR):
        line = form.sub(_assigned, line)
    line = _HEADER.sub(lambda found: found[1] + "*" * len(found[2]), line)
    return _ASSIGNED.sub(_assigned, line)


def _encoded(value: str) -> Iterator[str]:
    """Yield the forms in which a secret is found in other texts: hexadecimal, percent-encoded, in Base64."""
    if len(value) < _SHORTEST_CHARS:
        return
    data = value.encode("utf-8", "surrogateescape")
    yield from {data.hex(), data.hex().upper(), quote(value, safe=""), quote_plus(value)} - {value}
    for before in range(3):
        # Within a longer text a secret may begin at each of three places of Base64's groups; what is shared with its
        # neighbours is left out.
        first = -(-before * 8 // 6)
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * before + data).decode().rstrip("=")
            yield text[first : (before + len(data)) * 8 // 6]


def _without_keys(text: str) -> str:
    """Hide private keys in PEM form, and the halves of those that the text's beginning or end cuts."""
    parts: list[str] = []
    done = 0
    marks = list(_KEY_MARK.finditer(text))
    for index, mark in enumerate(marks):
        following = marks[index + 1] if index + 1 < len(marks) else None
        begins, ends = mark.start(), mark.end()
        if mark[1] == "END":
            begins = max(done, begins - _tail_of_key(text[max(done, begins - _KEY_CHARS) : begins]))
        elif following is not None and following[1] == "END" and following.start() - ends <= _KEY_CHARS:
            ends = following.start()
        else:
            body = _KEY_BODY.match(text, ends, ends + _KEY_CHARS)
            ends = body.end() if body else ends
        if begins < done:
            continue
        parts += [text[done:begins], "*" * (ends - begins)]
        done = ends
    return "".join([*parts, text[done:]])


def _tail_of_key(before: str) -> int:
    """Return how many of the characters before a key's end mark are lines of the key."""
    length = 0
    for part in reversed(_LINE_END.split(before)):
        if part.strip(" \t\r") and not re.fullmatch(r"[A-Za-z0-9+/=\s]+", part):
            break
        if " " in part.strip():
            break  # words
        length += len(part)
    return length


def _is_secret(name: str, value: str) -> bool:
    if not is_secret_name(name) or _HARMLESS.fullmatch(value):
        return False
    return not ("tokens" in name.lower() and _COUNT.fullmatch(value))


def _in_query(found: re.Match[str]) -> str:
    if not _QUERY_SECRET.fullmatch(found[1]) and not _is_secret(found[1], found[2]):
        return found[0]
    return f"{found[1]}={'*' * len(found[2])}"


def _below_name(found: re.Match[str]) -> str:
    if not is_secret_name(found[1]) or "tokens" in found[1].lower():
        return found[0]
    return found[1] + found[2] + "*" * len(found[3])


def _assigned(found: re.Match[str]) -> str:
    if not _is_secret(found[1], found[3]):
        return found[0]
    return found[1] + found[2] + "*" * len(found[3])
