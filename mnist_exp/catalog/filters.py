"""Filters of records, as they are typed: `optimizer.lr>0.05 and (model=cnn or status=failed)`."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import pyparsing as pp

from mnist_exp.catalog import fields
from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError, did_you_mean

Filter = Callable[[Record], bool]
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
CONTAINS = "~"
EQUAL = ("=", "==")
BY_THEIR_BEGINNING = ("id", "sweep")
_ALLOWED = {
    "kind": ("run", "sweep", "job"),
    "status": ("RUNNING", "FINISHED", "FAILED", "KILLED"),
    "in_mlflow": ("true", "false"),
}
_HELP = (
    "A filter compares fields with values by = != < <= > >= and ~ (contains), joined by and, or, "
    "not and parentheses: 'optimizer.lr>0.05 and model=cnn'"
)


@dataclass(frozen=True)
class _Comparison:
    """A field, an operator and a value; calling it tells whether a record has that."""

    name: str
    sign: str
    text: str

    def __call__(self, record: Record) -> bool:
        found, wanted = fields.value(record, self.name), self.wanted
        if self.sign == CONTAINS:
            return found is not None and self.text.lower() in str(found).lower()
        if found is None or wanted is None:
            is_same = found is wanted
            return is_same if self.sign in EQUAL else self.sign == "!=" and not is_same
        if isinstance(found, float) and isinstance(wanted, float):
            return _COMPARE[self.sign](found, wanted)
        if self.name in BY_THEIR_BEGINNING and self.sign in EQUAL:
            return str(found).startswith(self.text)
        return _COMPARE[self.sign](str(found).lower(), self.text.lower())

    @property
    def wanted(self) -> fields.Value:
        """The value as a number if it is one, 95% as well; None for what stands for nothing."""
        if self.text.lower() in ("null", "none", ""):
            return None
        if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", self.text):
            return float(share[1]) / 100
        return fields.parsed(self.text)

    def check(self, records: Sequence[Record]) -> None:
        """Raise ConfigError for a value that no record could ever have in this field."""
        typed = f"{self.name}{self.sign}{self.text}"
        if self.sign == CONTAINS or self.wanted is None:
            return
        if (allowed := _ALLOWED.get(self.name)) and self.text.lower() not in map(
            str.lower, allowed
        ):
            near = self.text.upper() if allowed[0].isupper() else self.text.lower()
            raise ConfigError(
                f"{typed}: there is no such {self.name}. {did_you_mean(near, allowed)}"
                f"Allowed: {', '.join(allowed)}"
            )
        if self.name in ("started", "ended") and not _is_time(self.text):
            raise ConfigError(
                f"{typed}: must be a time or the beginning of one, as in 2026-11 or "
                f"2026-11-27T17:29"
            )
        found = [value for r in records if (value := fields.value(r, self.name)) is not None]
        if isinstance(self.wanted, str) and all(isinstance(value, float) for value in found):
            example = f", as in {self.name}{self.sign}{found[0]:g}" if found else ""
            raise ConfigError(
                f"{typed}: {self.name} is a number, and {self.text!r} is none{example}"
            )


def _is_time(text: str) -> bool:
    """Return whether a text is the beginning of a time in ISO 8601, a year at least."""
    template = "2000-01-01T00:00:00.000"
    shape = re.fullmatch(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d{1,3})?)?)?)?)?)?", text)
    try:
        datetime.fromisoformat(text + template[len(text) :])
    except ValueError:
        return False
    return shape is not None


def parse(text: str, records: Sequence[Record]) -> Filter:
    """Return the filter that a text describes. Upper and lower case of texts are the same to it.

    Args:
        text: The filter, as it was typed.
        records: All records: what they have can be asked for.

    Raises:
        ConfigError: It cannot be parsed, or asks for a field or a value that none could have.
    """
    try:
        (parsed,) = _grammar().parse_string(text, parse_all=True)
    except pp.ParseBaseException as error:
        place = error.loc
        rest = repr(text[place : place + 20]) if place < len(text) else "the end of it"
        raise ConfigError(
            f"{text!r}: cannot be read as a filter from character {place + 1} on, {rest}. {_HELP}"
        ) from None
    return _built(parsed, records, fields.names(records))


def _grammar() -> pp.ParserElement:
    """Return the grammar of filters. Values with spaces or signs in them are quoted."""
    quoted = pp.QuotedString('"', esc_char="\\") | pp.QuotedString("'", esc_char="\\")
    keyword = pp.CaselessKeyword("and") | pp.CaselessKeyword("or") | pp.CaselessKeyword("not")
    name = pp.QuotedString("`") | ~keyword + pp.Regex(r"[A-Za-z_][\w./:-]*")
    sign = pp.one_of([*_COMPARE, CONTAINS])
    bare = pp.Regex(r"[^\s()'\"=<>!~]+")
    comparison = (name - sign - (quoted | bare)).set_parse_action(
        lambda tokens: _Comparison(*tokens)
    )
    grammar: pp.ParserElement = pp.infix_notation(
        comparison,
        [
            (pp.CaselessKeyword("not"), 1, pp.OpAssoc.RIGHT),
            (pp.CaselessKeyword("and"), 2, pp.OpAssoc.LEFT),
            (pp.CaselessKeyword("or"), 2, pp.OpAssoc.LEFT),
        ],
    )
    return grammar


def _built(parsed: Any, records: Sequence[Record], known: Sequence[str]) -> Filter:
    """Return the filter of what pyparsing has grouped: a comparison, or a list of operands."""
    if isinstance(parsed, _Comparison):
        comparison = replace(parsed, name=fields.full_name(parsed.name, known))
        comparison.check(records)
        return comparison
    if parsed[0] == "not":
        negated = _built(parsed[1], records, known)
        return lambda record: not negated(record)
    operands = [_built(operand, records, known) for operand in parsed[::2]]
    join = all if parsed[1] == "and" else any
    return lambda record: join(operand(record) for operand in operands)
