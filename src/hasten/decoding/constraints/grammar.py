"""Text under a JSON schema, a regular expression, a list of choices or a grammar."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from hasten.decoding.constraints.base import ConstrainContext, ConstraintError
from hasten.decoding.params import SamplingParams, StructuredOutputs
from hasten.methods import method

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LIMITS: dict[str, Any] = {
    "max_grammar_size": 200_000,  # symbols
    "max_items_in_row": 2_000,  # Earley items after one byte
    "step_max_items": 50_000,  # Earley items a mask
    "initial_lexer_fuel": 200_000,  # nodes of regular expressions; about 4 ms
    "step_lexer_fuel": 200_000,  # the same, a mask; about 15 ms
    "max_lexer_states": 20_000,  # 1 to 2 kB each, a sequence
}
"""What one request may cost the library. It counts its work, so the same request meets the same
limit on any machine and at any load; what goes beyond ends with an error."""

MAX_REASON = 300
"""Characters of the library's messages that are passed on."""


@method(
    "grammar",
    slot="constrain",
    paper="Efficient Guided Generation for Large Language Models (2307.09702)",
    exact="bitwise",
    does=("limits-tokens",),
)
@dataclass(frozen=True)
class Grammar:
    """Text follows a request's JSON schema, regular expression, choice or grammar.

    Masks come from llguidance: an Earley parser over lexemes that are derivatives of regular
    expressions, walked along a trie of the vocabulary. A token may follow if some allowed text
    goes on with its bytes, however a tokenizer would have cut that text. Nothing is computed
    ahead, so compiling takes milliseconds, and both it and each mask stop at a limit (`LIMITS`).
    At the limit that is some 0.3 s, so servers compile in a thread beside the engine's.

    ``cached`` grammars are kept compiled, the last used ones (0: each is compiled as it is used,
    by the engine). Between two tokens of JSON at most
    ``whitespace`` blank characters stand, so that a model that only indents comes to an end.
    """

    cached: int = 64
    whitespace: int = 24

    def __post_init__(self) -> None:
        for name in ("cached", "whitespace"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}, must be at least 0")

    def start(self, context: ConstrainContext) -> GrammarConstraining:
        return GrammarConstraining(self, context)


class GrammarConstraining:
    """Compiled grammars of one engine. The vocabulary's table is made for the first of them.

    Any thread may compile: the library lets others run meanwhile. What is kept is only copied, and
    by the engine's thread alone.
    """

    def __init__(self, method: Grammar, context: ConstrainContext) -> None:
        self._method = method
        self._context = context
        self._making_table = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._keeping = threading.Lock()
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()

    def is_prepared(self, params: SamplingParams) -> bool:
        """See `hasten.decoding.constraints.base.Constraining.is_prepared`."""
        wanted = params.structured_outputs
        return wanted is None or not self._method.cached or wanted in self._compiled

    def prepare(self, params: SamplingParams) -> None:
        """See `hasten.decoding.constraints.base.Constraining.prepare`."""
        if not self.is_prepared(params) and self._context.tokenizer is not None:
            assert params.structured_outputs is not None
            self._keep(params.structured_outputs, self._compile(params.structured_outputs))

    def open(self, params: SamplingParams, eos: Set[int]) -> GrammarState | None:
        """See `hasten.decoding.constraints.base.Constraining.open`."""
        wanted = params.structured_outputs
        if wanted is None:
            return None
        tokenizer = self._context.tokenizer
        if tokenizer is None:
            raise ConstraintError("structured_outputs needs a tokenizer")
        matcher = self._compiled.get(wanted)
        if matcher is None:
            matcher = self._compile(wanted)
        self._keep(wanted, matcher)
        # a stop token with a text of its own is text, and follows where the grammar has it
        ends = set(eos) | (set(params.stop_token_ids) & tokenizer.special_ids)
        state = GrammarState(matcher.deep_copy(), ends, self._context.vocab_size)
        if state.is_complete():
            raise ConstraintError(f"structured_outputs.{wanted.kind} allows no text at all")
        return state

    def _keep(self, wanted: StructuredOutputs, matcher: LLMatcher) -> None:
        """Have it as the last used one."""
        with self._keeping:
            self._compiled[wanted] = matcher
            self._compiled.move_to_end(wanted)
            while len(self._compiled) > self._method.cached:
                self._compiled.popitem(last=False)

    def _compile(self, wanted: StructuredOutputs) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False, **LIMITS)
        grammar = LLMatcher.grammar_from_lark(lark(wanted, self._method.whitespace))
        with self._making_table:
            if self._vocabulary is None:
                self._vocabulary = self._table()
        matcher = LLMatcher(self._vocabulary, grammar, limits=limits, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"structured_outputs.{wanted.kind}: {_reason(matcher)}")
        return matcher

    def _table(self) -> LLTokenizer:
        """The bytes of each id, and one more id that stands for the end: which ids really end a
        sequence is a matter of the request."""
        from llguidance import LLTokenizer, TokenizerWrapper

        size, tokenizer = self._context.vocab_size, self._context.tokenizer
        assert tokenizer is not None
        special = [token for token in tokenizer.special_ids if token < size]
        return LLTokenizer(
            TokenizerWrapper(
                _Vocabulary([*map(tokenizer.token_bytes, range(size)), b"<end>"], [*special, size])
            )
        )


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = len(tokens) - 1

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("only forced text is cut into tokens, and nothing is forced")


class GrammarState:
    """A place in the text of one sequence. See `hasten.decoding.constraints.base`."""

    def __init__(self, matcher: LLMatcher, ends: set[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self._vocab_size = vocab_size
        self._behind = 0  # tokens from an end on
        self._masked: NDArray[np.bool_] | None = None

    def mask(self, row: NDArray[np.float32]) -> None:
        if not self._behind:
            row[self._banned()] = -np.inf

    def advance(self, token: int) -> None:
        if self._behind or token in self._ends:
            self._behind += 1
            return
        if not self._matcher.try_consume_tokens([token]):
            self._check()
            raise ValueError(f"token {token} cannot follow in this grammar")
        self._masked = None

    def rollback(self, count: int) -> None:
        behind = min(count, self._behind)
        self._behind -= behind
        if count > behind:
            self._matcher.rollback(count - behind)
            self._check()
            self._masked = None

    def allowed(self, paths: Sequence[Sequence[int]]) -> list[int]:
        if self._behind:
            return [len(path) for path in paths]
        # on a copy: what is found out about paths that are not taken counts for no limit
        scout = self._matcher.deep_copy()
        return [self._count(scout, path) for path in paths]

    def _count(self, scout: LLMatcher, path: Sequence[int]) -> int:
        end = next((i for i, token in enumerate(path) if token in self._ends), len(path))
        text = list(path[:end])
        count = int(scout.validate_tokens(text))
        if end < len(path) and count == end and scout.try_consume_tokens(text) == end:
            if scout.is_accepting():
                count = len(path)  # behind an end everything may stand
            scout.rollback(end)
        return len(path) if scout.is_error() else count

    def fork(self) -> Self:
        twin = type(self)(self._matcher.deep_copy(), self._ends, self._vocab_size)
        twin._behind, twin._masked = self._behind, self._masked
        return twin

    def is_accepting(self) -> bool:
        return bool(self._behind or self._matcher.is_accepting())

    def is_complete(self) -> bool:
        if self._behind or not self._matcher.is_accepting():
            return bool(self._behind)
        return int(self._banned().sum()) == self._vocab_size - len(self._ends)

    def _banned(self) -> NDArray[np.bool_]:
        """Which tokens may not follow, bool [V]. Computed once a place."""
        if self._masked is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
            self._masked = allowed == 0
            self._masked[list(self._ends)] = not self._matcher.is_accepting()
        return self._masked

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"structured_outputs: {_reason(self._matcher)}")


def lark(wanted: StructuredOutputs, whitespace: int) -> str:
    """What a request asks for as a grammar in llguidance's dialect of Lark.

    Raises:
        ConstraintError: it is not written as it should be.
    """
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    where = f"structured_outputs.{wanted.kind}"
    if wanted.json is not None or wanted.json_object:
        schema = {"type": "object"} if wanted.json_object else json.loads(str(wanted.json))
        if schema is True:
            schema = {}
        if isinstance(schema, dict):
            blank = rf"[\x20\x0A\x0D\x09]{{0,{whitespace}}}"
            # among these options is "lenient", which drops what the library does not know
            schema["x-guidance"] = {"whitespace_pattern": blank}
        body = f"start: %json {json.dumps(schema)}"
    elif wanted.regex is not None:
        body = f"start: /{regex_to_lark(wanted.regex)}/"
    elif wanted.choice is not None:
        body = f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, wanted.choice))}"
    else:
        assert wanted.grammar is not None
        if "%llguidance" in wanted.grammar:
            raise ConstraintError(f"{where}: %llguidance is not for requests; leave it out")
        try:
            body = any_to_lark(wanted.grammar)
        except Exception as error:  # what its parser raises
            raise ConstraintError(f"{where}: {str(error)[:MAX_REASON]}") from None
    # Forcing would allow but one way to cut text that must follow into tokens. Without it, what
    # may follow depends on the text alone, and the law is the model's own under that condition.
    return f'{body}\n%llguidance {{"no_forcing": true}}'


def _reason(matcher: LLMatcher) -> str:
    """The library's message, without the excerpt of the grammar below it."""
    message = " ".join(matcher.get_error().split("\n   1 |")[0].split())
    message = message.removesuffix(" <non-verbose/>")[:MAX_REASON]
    if message == "NoExtensionBias":
        return "the model has no token with which this text could go on"
    costly = any(word in message for word in ("limit", "max is"))
    return f"too costly, make it simpler: {message}" if costly else message
