"""What is printed is read back, and nothing but registered words, literals and two operators is ever read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.forms import FORMS, Dense, Diagonal, Form, LowRank, parse
from eckart.forms.base import as_form
from eckart.forms.language import MAX_LENGTH, Vocabulary

numbers = st.none() | st.integers(1, 10**6)
leaves: st.SearchStrategy[Form] = (
    st.builds(LowRank, numbers, st.integers(1, 64)) | st.builds(Dense, numbers) | st.just(Diagonal())
)
expressions = st.recursive(
    leaves, lambda f: st.builds(lambda a, b: a + b, f, f) | st.builds(lambda a, b: a @ b, f, f), max_leaves=12
)


@given(expressions)
@settings(deadline=None)
def test_every_expression_is_read_back(form: Form) -> None:
    again = parse(str(form))
    assert (again, hash(again), str(again)) == (form, hash(form), str(form))


def test_defaults_are_left_out() -> None:
    assert str(LowRank()) == "low_rank()"
    assert str(LowRank(4)) == "low_rank(rank=4)"
    assert str(LowRank(None, 8)) == "low_rank(multiple=8)"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("low_rank", LowRank()),
        ("low_rank(3)", LowRank(3)),
        ("low_rank(3, multiple=4)", LowRank(3, 4)),
        (" low_rank ( rank = 3 ) ", LowRank(3)),
        ("low_rank(rank=None)", LowRank()),
        ("(diagonal)+(dense(width=2)@dense)", Diagonal() + Dense(2) @ Dense()),
        ("diagonal\t+ dense", Diagonal() + Dense()),
    ],
)
def test_text_may_be_written_in_several_ways(text: str, form: Form) -> None:
    assert parse(text) == as_form(text) == form
    assert as_form(form) is form


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("low_rnak(rank=3)", r"unknown form 'low_rnak'; did you mean 'low_rank'\?"),
        ("xyzzy()", "unknown form 'xyzzy'; known: .*low_rank"),
        ("low_rank(rnak=3)", r"low_rank\(\) has no setting 'rnak'; did you mean 'rank'\?"),
        ("low_rank(3, rank=3)", r"low_rank\(\) is given 'rank' twice"),
        ("select(1, 2)", r"select\(\) takes at most 1 settings \(width\)"),
        ("diagonal(1)", "takes at most 0 settings"),
        ("low_rank(rank='three')", "the rank is a positive integer"),
        ("low_rank(rank=1e300)", "the rank is a positive integer"),
        ("low_rank(rank=[3])", "is not a number, text or tuple"),
        ("low_rank(rank=b'3')", "is not a number, text or tuple"),
        ("low_rank(rank=dense())", "the rank is a positive integer"),
        ("low_rank(*[3])", "cannot read form"),
        ("low_rank(**{'rank': 3})", "has no setting None"),
        ("low_rank(rank=2+2j)", "is not a number, text or tuple"),
        ("low_rank() - diagonal()", "expected name"),
        ("low_rank() * 2", "expected name"),
        ("low_rank() + 2", "cannot read form"),
        ("-low_rank()", "expected name"),
        ("", "cannot read form ''"),
        ("low_rank(", "cannot read form"),
        ("low_rank() low_rank()", "cannot read form"),
        ("low_rank()\x00", "cannot read form"),
        ("\ud800", "cannot read form"),
        ("x = low_rank()", "cannot read form"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {0}')",
        "low_rank(rank=__import__('os').system('touch {0}'))",
        "low_rank(rank=open('{0}', 'w'))",
        "open('{0}', 'w')",
        "low_rank.__init__.__globals__['__builtins__']['open']('{0}', 'w')",
        "(lambda: open('{0}', 'w'))()",
        "[open('{0}', 'w') for _ in '1'][0]",
        "low_rank(rank=f\"{{open('{0}', 'w')}}\")",
        "low_rank() if open('{0}', 'w') else diagonal()",
        "(low_rank := open('{0}', 'w'))",
        "exec(\"open('{0}', 'w')\")",
        "low_rank(rank=1)(open('{0}', 'w'))",
    ],
)
def test_nothing_is_executed(text: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(ValueError):
        parse(text.format(trace))
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [
        "low_rank()" + "+low_rank()" * 40,
        "(" * 40 + "low_rank()" + ")" * 40 + "@low_rank()" * 35,
        "(" * 2000 + "low_rank()" + ")" * 2000,
        "-" * 4000 + "1",
        "low_rank(rank=" * 280 + "1" + ")" * 280,
        "low_rank(rank=" + "9" * 4050 + ").x",
        "low_rank(rank=" + "[" * 500 + "]" * 500 + ")",
        "low_rank()" + " " * MAX_LENGTH,
        "a" * 10**7,
    ],
    ids=lambda text: f"{text[:20]}... of {len(text)}",
)
def test_deep_and_long_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@given(st.text(alphabet="low_rank()dense@+=,1 '\"[]{}\\\n", max_size=60))
@settings(deadline=None)
def test_any_text_is_a_form_or_a_value_error(text: str) -> None:
    try:
        form = parse(text)
    except ValueError as error:
        assert len(str(error)) > 10  # noqa: PT017
    else:
        assert parse(str(form)) == form


def test_a_word_is_entered_once_and_nested_words_are_read_back() -> None:
    words: Vocabulary[object] = Vocabulary("thing")

    @words.word("inner")
    @dataclass(frozen=True)
    class Inner:
        size: tuple[int, ...] = (1, 2)

    @words.word("outer")
    @dataclass(frozen=True)
    class Outer:
        part: Inner | None = None
        name: str = ""

        def __str__(self) -> str:
            return words.print(self)

    Inner.__str__ = lambda self: words.print(self)  # type: ignore[method-assign]
    thing = Outer(Inner((3,)), 'it\'s "so"')
    assert str(thing) == "outer(part=inner(size=(3,)), name='it\\'s \"so\"')"
    assert words.parse(str(thing)) == thing
    assert words.parse("outer") == Outer()
    with pytest.raises(ValueError, match="cannot be combined with operators"):
        words.parse("inner() + inner()")
    with pytest.raises(ValueError, match="two things are called 'inner'"):
        words.word("inner")(Inner)


def test_registered_words_are_named_after_their_classes() -> None:
    for word, cls in FORMS.words.items():
        assert word == re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
