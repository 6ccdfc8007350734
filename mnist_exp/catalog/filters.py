"""Filters of records, as they are typed: `optimizer.lr>0.05 and (model=cnn or status=failed)`."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyparsing as pp

from mnist_exp.catalog import fields
from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError

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
_HELP = (
    "A filter compares fields with values by = != < <= > >= and ~ (contains), joined by and, or, "
    "not and parentheses: 'optimizer.lr>0.05 and model=cnn'"
)


@dataclass(frozen=True)
class _Comparison:
    """A field, an operator and a value; calling it tells whether a record has that."""

    name: str
    sign: str
    value: str

    def __call__(self, record: Record) -> bool:
        found, wanted = fields.value(record, self.name), _wanted(self.value)
        if self.sign == CONTAINS:
            return found is not None and self.value.lower() in str(found).lower()
        if found is None or wanted is None:
            is_same = found is wanted
            return is_same if self.sign in ("=", "==") else self.sign == "!=" and not is_same
        if isinstance(found, float) and isinstance(wanted, float):
            return _COMPARE[self.sign](found, wanted)
        return _COMPARE[self.sign](str(found).lower(), self.value.lower())


def _wanted(text: str) -> fields.Value:
    return None if text.lower() in ("null", "none", "") else fields.parsed(text)


def parse(text: str, known: Sequence[str]) -> Filter:
    """Return the filter that a text describes. Upper and lower case of texts are the same to it.

    Args:
        text: The filter, as it was typed.
        known: The full names of the fields that records have.

    Raises:
        ConfigError: It cannot be parsed, or names a field that no record has.
    """
    try:
        (parsed,) = _grammar().parse_string(text, parse_all=True)
    except pp.ParseBaseException as error:
        place = error.loc
        rest = repr(text[place : place + 20]) if place < len(text) else "the end of it"
        raise ConfigError(
            f"{text!r}: cannot be read as a filter from character {place + 1} on, {rest}. {_HELP}"
        ) from None
    return _built(parsed, known)


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


def _built(parsed: Any, known: Sequence[str]) -> Filter:
    """Return the filter of what pyparsing has grouped: a comparison, or a list of operands."""
    if isinstance(parsed, _Comparison):
        return _Comparison(fields.full_name(parsed.name, known), parsed.sign, parsed.value)
    if parsed[0] == "not":
        negated = _built(parsed[1], known)
        return lambda record: not negated(record)
    operands = [_built(operand, known) for operand in parsed[::2]]
    join = all if parsed[1] == "and" else any
    return lambda record: join(operand(record) for operand in operands)
