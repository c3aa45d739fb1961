"""The tokenizer that a GGUF file describes, built on the `tokenizers` library. Torch-free.

The file holds the tokens and, for byte-level vocabularies, the merges; how a text is cut before
merging is only named (``tokenizer.ggml.pre``). `PRE` says what the names stand for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from hasten.models.facts import CheckpointError
from hasten.models.gguf.file import GGUF

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of ``tokenizer.ggml.token_type``."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in SentencePiece vocabularies

MAX_PIECE = 1024  # characters; the ways to cut a token are tried, so that time grows as its square

SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
}
ENDING_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
ENDING_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<EOT>",
        "</s>",
    }
)
"""Control tokens that end a text whether the metadata names them or not: many files of chat models
name only the end of a document. Source: llama-vocab.cpp of llama.cpp."""

# How a text is cut into words, from the tokenizer.json of the models.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters that have cases, as DeepSeek's first tokenizers list them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class Cut:
    """What a name in ``tokenizer.ggml.pre`` stands for.

    Attributes:
        patterns: applied one after the other; matches and what lies between them become words.
        whole: a word that is a token is taken as it is, without merging.
        bos: a text starts with the first token unless the file says otherwise.
        nfc: texts are normalized to NFC.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_DIGITS = Cut((r"\p{N}", GPT2))
PRE = {
    # Files from before the key was there; llama.cpp reads them so too.
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4"), Cut((GPT2,))),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2"),
        Cut((LLAMA3,), whole=True, bos=True),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), Cut((LLAMA3,))),
    "glm4": Cut((LLAMA3,), whole=True),
    "qwen2": Cut((QWEN2,), nfc=True),
    "qwen35": Cut((QWEN35,)),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), Cut((QWEN2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    "command-r": Cut(_DIGITS.patterns, nfc=True),
    "tekken": Cut((TEKKEN,), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Cut((GPT4O,))),
    "deepseek-llm": Cut(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")),
    "deepseek-v3": Cut(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
        )
    ),
}
"""Source of the names and of those patterns that are not in a tokenizer.json: llama-vocab.cpp."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and what kind each is."""

    tokens: list[str]
    kinds: list[int]

    def ids(self) -> dict[str, int]:
        """Ids by token. Fillers are left out; of a token that occurs twice the first is meant."""
        found: dict[str, int] = {}
        for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind != UNUSED:
                found.setdefault(token, number)
        return found

    def of_kind(self, *kinds: int) -> list[str]:
        pairs = zip(self.tokens, self.kinds, strict=True)
        return list(dict.fromkeys(token for token, kind in pairs if token and kind in kinds))


def gguf_tokenizer(gguf: GGUF) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]:
    """(tokenizer, special tokens by name, chat templates by name)."""
    vocabulary = _vocabulary(gguf)
    kind, cut = gguf.get("tokenizer.ggml.model"), gguf.get("tokenizer.ggml.pre", "default")
    try:
        if kind == "gpt2" and cut in PRE:
            core = _byte_level(gguf, vocabulary, PRE[str(cut)])
        elif kind == "llama":
            core = _sentence_piece(gguf, vocabulary)
        else:
            core = _beside(gguf, f"the kind of tokenizer, {kind!r} with pre {cut!r}, is not known")
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise gguf.wrong(f"the tokenizer in the metadata is not usable ({error})") from error
    return core, _special_tokens(gguf, vocabulary), _templates(gguf)


def ending_ids(gguf: GGUF) -> list[int]:
    """Tokens that end a text: those that the metadata names, and control tokens known for it."""
    found = [gguf.get(f"tokenizer.ggml.{name}") for name in ENDING_IDS]
    ids = [number for number in found if isinstance(number, int)]
    kinds = gguf.numbers("tokenizer.ggml.token_type")
    for number, token in enumerate(gguf.texts("tokenizer.ggml.tokens")):
        if token in ENDING_TEXTS and number < len(kinds) and kinds[number] == CONTROL:
            ids.append(number)
    return list(dict.fromkeys(ids))


def _beside(gguf: GGUF, what: str) -> tokenizers.Tokenizer:
    """The model's own tokenizer.json, where the metadata do not say how texts are cut."""
    path = gguf.path.with_name("tokenizer.json")
    if not path.is_file():
        raise CheckpointError(
            what,
            gguf.path,
            "Texts would be cut into other tokens than in training. Put the model's own "
            "tokenizer.json beside the file; it is used then.",
        )
    log.warning("%s: %s; %s is used instead", gguf.path, what, path)
    return tokenizers.Tokenizer.from_file(str(path))


def _vocabulary(gguf: GGUF) -> Vocabulary:
    count = gguf.length("tokenizer.ggml.tokens")
    if not count:
        raise gguf.wrong("no tokenizer: 'tokenizer.ggml.tokens' is missing")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is not None and count > embedding.shape[0]:
        raise gguf.wrong(f"{count} tokens, but 'token_embd.weight' has {embedding.shape[0]} rows")
    stated = gguf.length("tokenizer.ggml.token_type")
    if stated not in (0, count):
        raise gguf.wrong(f"'tokenizer.ggml.token_type' lists {stated} of {count} tokens")
    kinds = [int(kind) for kind in gguf.numbers("tokenizer.ggml.token_type")] or [NORMAL] * count
    return Vocabulary(list(gguf.texts("tokenizer.ggml.tokens")), kinds)


def _byte_level(gguf: GGUF, vocabulary: Vocabulary, cut: Cut) -> tokenizers.Tokenizer:
    """Byte-level merges (GPT-2)."""
    merges = []
    for merge in gguf.texts("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise gguf.wrong(f"'tokenizer.ggml.merges' holds {merge!r}, not two tokens")
        merges.append((left, right))
    if not merges:
        raise gguf.wrong("'tokenizer.ggml.merges' is missing")
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=cut.whole)
    )
    if cut.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    _add_tokens(gguf, vocabulary, core)
    _add_ends(gguf, vocabulary, core, cut.bos)
    return core


def _sentence_piece(gguf: GGUF, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece's merging by score, as ranked merges; what has no token becomes bytes.

    Source of the ranking: the converter of SentencePiece models in transformers. A token of n
    characters is reached by up to n - 1 merges, all of the token's score.
    """
    scores = gguf.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise gguf.wrong("'tokenizer.ggml.scores' must have a score for each token")
    ids = vocabulary.ids()
    ranked: list[tuple[float, int, int, str, str]] = []  # equal ranks keep the order of ids
    for token, number in ids.items():
        if vocabulary.kinds[number] != NORMAL:
            continue
        if len(token) > MAX_PIECE:
            raise gguf.wrong(f"token {number} has {len(token)} characters, over {MAX_PIECE}")
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                ranked.append((-scores[number], -len(left), -len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3])
    unknown = gguf.get("tokenizer.ggml.unknown_token_id")
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[merge[3:] for merge in ranked],
            unk_token=_token(gguf, vocabulary, unknown, "unknown_token_id"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(gguf.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*joined, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    _add_tokens(gguf, vocabulary, core)
    _add_ends(gguf, vocabulary, core, True)
    return core


def _add_tokens(gguf: GGUF, vocabulary: Vocabulary, core: tokenizers.Tokenizer) -> None:
    """Tokens that are found in a text before it is cut."""
    # The added tokens of Phi 3 swallow the spaces after them, which GGUF cannot say.
    name = str(gguf.get("general.name", "")).lower()
    phi3 = gguf.get("general.architecture") == "phi3" or "phi-3" in name or "phi3" in name
    swallows = phi3 and gguf.get("tokenizer.ggml.model") == "llama"
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    core.add_special_tokens(
        [
            AddedToken(token, normalized=False, rstrip=swallows and token not in keeps)
            for token in vocabulary.of_kind(UNKNOWN, CONTROL)
        ]
    )
    core.add_tokens(
        [
            AddedToken(token, normalized=False, rstrip=swallows)
            for token in vocabulary.of_kind(USER_DEFINED)
        ]
    )


def _add_ends(gguf: GGUF, vocabulary: Vocabulary, core: tokenizers.Tokenizer, bos: bool) -> None:
    """Put the first and last token around a text, where the file wants them."""
    template, tokens = ["$A"], []
    for name, default in (("bos", bos), ("eos", False)):
        if not gguf.get(f"tokenizer.ggml.add_{name}_token", default):
            continue
        number = gguf.get(f"tokenizer.ggml.{name}_token_id")
        token = _token(gguf, vocabulary, number, f"{name}_token_id")
        if token is None:
            raise gguf.wrong(f"'tokenizer.ggml.{name}_token_id' is missing")
        template = [token, *template] if name == "bos" else [*template, token]
        tokens.append((token, int(number or 0)))
    if tokens:
        core.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=list(dict.fromkeys(tokens))
        )


def _token(gguf: GGUF, vocabulary: Vocabulary, number: object, name: str) -> str | None:
    """The token of an id in the metadata."""
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(vocabulary.tokens):
        raise gguf.wrong(f"'tokenizer.ggml.{name}' is {number!r}, not a token's id")
    return vocabulary.tokens[number]


def _special_tokens(gguf: GGUF, vocabulary: Vocabulary) -> dict[str, str]:
    found = {
        name: _token(gguf, vocabulary, gguf.get(f"tokenizer.ggml.{key}"), key)
        for name, key in SPECIAL_IDS.items()
    }
    return {name: token for name, token in found.items() if token is not None}


def _templates(gguf: GGUF) -> dict[str, str]:
    """``tokenizer.chat_template``, and ``tokenizer.chat_template.<name>`` for those listed."""
    stated = {"default": gguf.get("tokenizer.chat_template")}
    for name in list(gguf.texts("tokenizer.chat_templates"))[:64]:
        stated[name] = gguf.get(f"tokenizer.chat_template.{name}")
    return {name: text for name, text in stated.items() if isinstance(text, str)}
