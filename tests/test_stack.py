"""Stacks: one notation everywhere, refusals that say why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten import method_tables, methods
from hasten.engine.engine import Engine
from hasten.methods import SLOTS, MethodError, find, method
from hasten.models.base import Decoder
from hasten.speculation.base import Drafter
from hasten.speculation.drafters.none import NoDraft
from hasten.speculation.drafters.prompt_lookup import PromptLookup
from hasten.stack import Stack, missing_needs

PLAIN = {slot: find(slot, name).cls() for slot, (_, name) in SLOTS.items()}


@pytest.mark.parametrize("text", [None, "", "plain", " plain ", "plain,", {}, Stack.parse()])
def test_plain(text: Any) -> None:
    stack = Stack.parse(text)
    assert stack.methods == PLAIN and list(stack.methods) == list(SLOTS)
    assert str(stack) == "plain" and stack.exact == "bitwise"


@pytest.mark.parametrize(
    "notation",
    [
        "draft=prompt-lookup(k=5),select=sink-window(window=40,sinks=2)",
        " select = sink-window( sinks=2 , window = 40 ),\n draft=prompt-lookup( k = 5 ), ",
        {"select": "sink-window(sinks=2,window=40)", "draft": "prompt-lookup(k=5)"},
        {
            "draft": find("draft", "prompt-lookup").cls(k=5),
            "select": find("select", "sink-window").cls(2, 40),
        },
        {
            "draft": find("draft", "prompt-lookup").cls(k=5),
            "select": "sink-window(sinks=2,window=40)",
        },
    ],
)
def test_notations(notation: Any) -> None:
    stack = Stack.parse(notation)
    assert stack["draft"].k == 5 and stack["draft"].max_ngram == 3
    assert (stack["select"].sinks, stack["select"].window) == (2, 40)
    assert str(stack) == "select=sink-window(sinks=2,window=40),draft=prompt-lookup(k=5)"
    assert Stack.parse(stack) is stack and Stack.parse(dict(stack.methods)) == stack


@given(
    k=st.integers(1, 99),
    ngram=st.tuples(st.integers(1, 5), st.integers(0, 4)),
    window=st.integers(1, 10**9),
    sinks=st.integers(0, 999),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    weights=st.sampled_from(["auto", "float32", "bfloat16"]),
    budget=st.integers(0, 99),
    chunk=st.integers(0, 99),
    slots=st.sets(st.sampled_from(list(SLOTS))),
)
def test_canonical_text_reads_back(
    k: int, ngram: tuple[int, int], window: int, sinks: int, dtype: str, weights: str,
    budget: int, chunk: int, slots: set[str],
) -> None:  # fmt: skip
    low, more = ngram
    everything = {
        "weights": f"checkpoint(dtype={weights})",
        "codec": f"native(dtype={dtype})",
        "select": f"sink-window(window={window},sinks={sinks})",
        "draft": f"prompt-lookup(max_ngram={low + more},min_ngram={low},k={k})",
        "verify": "sample-match",
        "control": f"fixed(k={budget})",
        "constrain": f"grammar(cached={k})",
        "schedule": f"stall-free(chunk={chunk})",
    }
    stack = Stack.parse({slot: everything[slot] for slot in slots})
    text = str(stack)
    assert Stack.parse(text) == stack and str(Stack.parse(text)) == text
    order = [part.split("=")[0] for part in text.split(",") if "=" in part.split("(")[0]]
    assert [s for s in order if s in SLOTS] == [s for s in SLOTS if s in order]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drafts=none", "unknown slot 'drafts' (did you mean 'draft'?)"),
        ("draft=lookup", "slot 'draft' has no method 'lookup'"),
        ("draft=prompt-lokup", "(did you mean 'prompt-lookup'?)"),
        ("draft=sink-window", "'sink-window' fills the slot 'select', not 'draft'"),
        ("draft=none,draft=prompt-lookup", "slot 'draft' is filled twice"),
        ("draft=none,draft=none", "slot 'draft' is filled twice"),
        ("prompt-lookup", "'prompt-lookup' is not slot=method; write for example"),
        ("prompt-lookup(k=8)", "'prompt-lookup(k=8)' is not slot=method"),
        ("draft=", "cannot read ''; write name or name(parameter=value)"),
        ("draft=a b", "cannot read 'a b'"),
        ("draft=prompt-lookup(k=8", "unbalanced parentheses"),
        ("draft=prompt-lookup)k=8(", "unbalanced parentheses"),
        ("draft=prompt-lookup(k=8))", "unbalanced parentheses"),
        ("draft=prompt-lookup(size=8)", "prompt-lookup has no parameter 'size'; it has: k, max"),
        ("draft=prompt-lookup(max_ngrm=8)", "(did you mean 'max_ngram'?)"),
        ("draft=prompt-lookup(8)", "prompt-lookup has no parameter '8'"),
        ("draft=prompt-lookup(plain)", "prompt-lookup has no parameter 'plain'"),
        ("draft=prompt-lookup(k=8,k=9)", "the parameter 'k' is given twice"),
        ("draft=none(k=8)", "none has no parameter 'k'; it has: none"),
        ("draft=prompt-lookup(k=many)", "prompt-lookup(k) is 'many', expected int"),
        ("draft=prompt-lookup(k=1.5)", "prompt-lookup(k) is '1.5', expected int"),
        ("draft=prompt-lookup(k=)", "prompt-lookup(k) is '', expected int"),
        ("draft=prompt-lookup(k=none)", "prompt-lookup(k) is 'none', expected int"),
        ("draft=prompt-lookup(k=0)", "draft=prompt-lookup: k=0: propose at least one token"),
        ("draft=prompt-lookup(min_ngram=4)", "draft=prompt-lookup: need 1 <= min_ngram (4)"),
        ("select=sink-window(window=0)", "select=sink-window: sinks=4, window=0"),
        ("codec=native(dtype=int3)", "codec=native: dtype is 'int3', expected one of"),
        ({"draft": None}, "slot 'draft' has no method 'None' (did you mean 'none'?)"),
        ({"select": PLAIN["draft"]}, "'none' does not fill the slot 'select'"),
        ({"nowhere": PLAIN["draft"]}, "'none' does not fill the slot 'nowhere'"),
    ],
)
def test_errors(text: Any, words: str) -> None:
    with pytest.raises(MethodError) as error:
        Stack.parse(text)
    assert words in str(error.value)


def test_the_weakest_promise_counts() -> None:
    assert Stack.parse("draft=prompt-lookup").exact == "bitwise"
    assert Stack.parse("draft=prompt-lookup,select=sink-window").exact == "lossy"


def test_baseline_keeps_what_defines_the_function() -> None:
    stack = Stack.parse(
        "weights=checkpoint(dtype=bfloat16),codec=native(dtype=bfloat16),"
        "select=sink-window(window=9),draft=prompt-lookup,control=fixed(k=3),"
        "schedule=stall-free(chunk=7)"
    )
    assert str(stack.baseline()) == (
        "weights=checkpoint(dtype=bfloat16),codec=native(dtype=bfloat16),"
        "select=sink-window(window=9)"
    )
    assert stack.baseline().baseline() == stack.baseline()
    assert str(Stack.parse("draft=prompt-lookup").baseline()) == "plain"


@dataclass(frozen=True)
class Both:
    """Fills two slots."""

    flag: bool = False
    level: int | None = 3
    share: float = 0.5
    name: str = "x"


@pytest.fixture
def both() -> Iterator[None]:
    find("draft", "none")
    does = ("limits-view", "changes-values")
    method("both", slot=("codec", "select"), exact="distribution", does=does)(Both)
    yield
    for slot in ("codec", "select"):
        del methods._CARDS[slot, "both"]


def test_one_method_in_two_slots(both: None) -> None:
    stack = Stack.parse("select=both(flag=TRUE, level=none, share=1e-3, name=y)")
    assert stack["select"] is stack["codec"] and stack["select"] == Both(True, None, 1e-3, "y")
    assert str(stack) == "codec=both(flag=true,level=None,share=0.001,name=y)"
    assert Stack.parse(str(stack)) == stack
    assert stack.baseline() == stack and Stack.parse(dict(stack.methods)) == stack
    assert stack.exact == "distribution"
    for text in ("select=both,codec=native", "codec=native,select=both", "codec=both,select=both"):
        with pytest.raises(MethodError, match="filled twice"):
            Stack.parse(text)
    for bad, kind in (("flag=maybe", "bool"), ("share=much", "float"), ("level=x", "int")):
        with pytest.raises(MethodError, match=f"expected {kind}"):
            Stack.parse(f"select=both({bad})")


@dataclass(frozen=True)
class Parts:
    """A drafter made of drafters."""

    first: Drafter = field(default=PromptLookup())
    of: tuple[Drafter, ...] = field(default=(PromptLookup(), NoDraft()))
    spare: Drafter | None = None
    k: int = 2

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of is empty")


@dataclass(frozen=True)
class Costly:
    """Needs what no model has, and is not exact."""


@pytest.fixture
def nested() -> Iterator[None]:
    find("draft", "none")
    method("parts", slot="draft", exact="bitwise")(Parts)
    method("costly", slot="draft", exact="lossy", needs=("full-attention-layers",))(Costly)
    method("both", slot=("codec", "draft"), exact="bitwise")(Both)
    yield
    for key in (("draft", "parts"), ("draft", "costly"), ("codec", "both"), ("draft", "both")):
        del methods._CARDS[key]


@pytest.mark.parametrize(
    ("text", "built", "canonical"),
    [
        ("parts", Parts(), "parts"),
        ("parts(first=prompt-lookup(k=8))", Parts(), "parts"),
        ("parts(first=none,k=3)", Parts(NoDraft(), k=3), "parts(first=none,k=3)"),
        (
            "parts( of = prompt-lookup( k = 5, max_ngram=4 ) | none |parts(of=none), spare=none)",
            Parts(of=(PromptLookup(5, 4), NoDraft(), Parts(of=(NoDraft(),)))),
            "parts(of=prompt-lookup(k=5,max_ngram=4)|none|parts(of=none))",
        ),
        (
            "parts(spare=parts(first=parts(first=none)))",
            Parts(spare=Parts(first=Parts(first=NoDraft()))),
            "parts(spare=parts(first=parts(first=none)))",
        ),
    ],
)
def test_methods_as_parameters(nested: None, text: str, built: Parts, canonical: str) -> None:
    for notation in (f"draft={text},control=fixed(k=3)", {"draft": text, "control": "fixed(k=3)"}):
        stack = Stack.parse(notation)
        assert stack["draft"] == built
        assert str(stack) == f"draft={canonical},control=fixed(k=3)"
        assert Stack.parse(str(stack)) == stack


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("first=prompt-lokup", "parts(first): slot 'draft' has no method 'prompt-lokup' (did you"),
        ("first=sink-window", "parts(first): 'sink-window' fills the slot 'select', not 'draft'"),
        ("first=", "parts(first): cannot read ''; write name or name(parameter=value)"),
        ("first=none|none", "parts(first): cannot read 'none|none'"),
        ("first=both", "parts(first): 'both' fills several slots (codec, draft) and cannot be"),
        ("of=none||none", "parts(of): cannot read ''"),
        ("of=none|prompt-lookup(k=0)", "parts(of): draft=prompt-lookup: k=0: propose at least"),
        ("of=none|parts(of=none|x)", "parts(of): parts(of): slot 'draft' has no method 'x'"),
        ("of=none|parts(of=none", "unbalanced parentheses"),
        ("spare=parts(k=x)", "parts(spare): parts(k) is 'x', expected int"),
    ],
)
def test_errors_of_methods_as_parameters(nested: None, inside: str, words: str) -> None:
    with pytest.raises(MethodError) as error:
        Stack.parse(f"draft=parts({inside})")
    assert words in str(error.value)


def test_parts_promise_and_need_for_the_whole(nested: None) -> None:
    stack = Stack.parse("draft=parts(spare=parts(of=none|costly))")
    assert stack.exact == "lossy" and Stack.parse("draft=parts").exact == "bitwise"
    with pytest.raises(MethodError, match="draft=costly cannot run on this model"):
        stack.check(())
    stack.check({"full-attention-layers"})


def test_the_card_shows_parts_as_a_stack_writes_them(nested: None) -> None:
    shown = find("draft", "parts").to_json()["parameters"]
    assert shown == {
        "first": "prompt-lookup",
        "of": "prompt-lookup|none",
        "spare": None,
        "k": 2,
    }
    assert "`of=prompt-lookup\\|none`" in method_tables.page()


def test_refusal_gives_the_reason(tiny: Callable[..., Decoder]) -> None:
    model = tiny("mistral", sliding_window=20)
    with pytest.raises(MethodError) as error:
        Engine(model, Stack.parse("select=sink-window"))
    assert str(error.value) == (
        "select=sink-window cannot run on mistral: it needs at least one layer that attends to "
        "all positions ('full-attention-layers'); choose another method for the slot 'select' "
        "(all)"
    )
    Engine(model, Stack.parse("draft=prompt-lookup"))
    Engine(tiny("llama"), Stack.parse("select=sink-window"))


def test_missing_needs() -> None:
    chosen = [find("draft", "prompt-lookup"), find("select", "sink-window")]
    assert missing_needs(chosen, ()) == [(chosen[1], "full-attention-layers")]
    assert missing_needs(chosen, {"full-attention-layers"}) == []
