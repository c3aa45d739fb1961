"""Text to token ids and back, over the `tokenizers` library.

``transformers`` is imported only where a checkpoint has no tokenizer.json (it costs seconds).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from hasten.models.facts import CheckpointError, read_json
from hasten.models.gguf.file import GGUF, is_gguf
from hasten.models.gguf.tokens import gguf_tokenizer

if TYPE_CHECKING:
    from hasten.models.chat_template import ChatTemplate

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
HELD = 6  # tokens held back at most; a code point has four bytes and so at most four tokens


class Tokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        vocab_size: ids it knows, added tokens included (a model's matrix may have more rows).
        bos_id, eos_id: None where tokenizer_config.json names none.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.core = core
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint.

        ``folder`` may also be a GGUF file, whose metadata hold all of that.
        """
        folder = Path(folder)
        if is_gguf(folder):
            return cls(*gguf_tokenizer(GGUF(folder)))
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        return cls(_core(folder), _special_tokens(folder, config), _templates(folder, config))

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.core.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.core.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_stream(
        self, context: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> TextStream:
        """Decode a text as its tokens arrive. ``context`` are the ids before it (the prompt):
        with them the first token keeps the space that would lead a text of its own."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return TextStream(lambda ids: self.decode(ids, False), context, skipped)

    def token_text(self, token: int) -> str:
        """One token as text, for lists of log-probabilities; may hold half a character."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for an id without a token."""
        raw = self.core.id_to_token(token)
        if raw is None:
            return b""
        if token in self._added:  # stands for itself, in any kind of vocabulary
            return str(raw).encode()
        if self._byte_level:
            return b"".join(
                bytes([_BYTE_OF[char]]) if char in _BYTE_OF else char.encode() for char in raw
            )
        if match := BYTE_TOKEN.fullmatch(raw):
            return bytes([int(match[1], 16)])
        return str(raw).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def fingerprint(self) -> str:
        """What the ids mean, as 64 hexadecimal digits: equal where every id stands for the same
        bytes and the same ids are special. Files of token ids carry it, so that they are not read
        with another vocabulary. How text is cut into tokens does not count.
        """
        digest = hashlib.sha256()
        for token in range(self.vocab_size):
            raw = self.token_bytes(token)
            digest.update(struct.pack("<I?", len(raw), token in self.special_ids) + raw)
        ends = (self.bos_id, self.eos_id)
        digest.update(struct.pack("<2q", *(-1 if end is None else end for end in ends)))
        return digest.hexdigest()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.core.get_added_tokens_decoder())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text, such as the end of a turn."""
        added = self.core.get_added_tokens_decoder()
        return frozenset(token for token, about in added.items() if about.special)

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel(" in repr(self.core.decoder)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as text; see `hasten.models.chat_template.ChatTemplate.render`."""
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        return self._template(name).render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """A conversation as token ids. The template writes the special tokens itself."""
        return self.encode(self.chat_text(messages, **options), add_special_tokens=False)

    def _template(self, name: str) -> ChatTemplate:
        from hasten.models.chat_template import ChatTemplate, ChatTemplateError

        if name not in self.chat_templates:
            raise ChatTemplateError(
                "this model has no chat template (a base model, most likely): send a prompt "
                "instead of messages, or put a chat_template.jinja beside its tokenizer.json"
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.chat_templates[name], self.special_tokens)
        return self._compiled[name]

    @cached_property
    def _compiled(self) -> dict[str, ChatTemplate]:
        return {}


class TextStream:
    """Incremental decoding: the pieces add up to the decoded whole, and none ends inside a
    character.

    Tokens are decoded together with those just before them, because their text depends on these
    (leading spaces, bytes of one character). Text that ends in a replacement character may still
    be completed by the next token and is held back, by at most `HELD` tokens: bytes that are not
    UTF-8 at all are then let through as replacement characters.

    (``tokenizers.decoders.DecodeStream`` has no flush, holds invalid bytes for ever and raises
    where a later byte spoils earlier ones; random models and byte-level grammars produce those.)
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        context: Sequence[int] = (),
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._skipped = skipped  # tokens without a text
        self._window = [token for token in context if token not in skipped][-HELD:]
        self._held = 0  # tokens at the end of the window whose text is not out
        self._out = decode(self._window)  # text of the window that is out

    def step(self, token: int) -> str:
        """The text that this token settles; may be empty."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        self._held += 1
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._emit(text, 0)
        if self._held <= HELD:
            return ""
        # More than one character can take: what ends before the last tokens is settled.
        for open_tokens in range(3, HELD):
            settled = self._decode(self._window[:-open_tokens])
            if settled + self._decode(self._window[-open_tokens:]) == text:
                return self._emit(settled, open_tokens)
        return self._emit(text, 0)

    def flush(self) -> str:
        """The rest, when no more tokens come: an unfinished character as a replacement one."""
        return self._emit(self._decode(self._window), 0) if self._held else ""

    def _emit(self, text: str, open_tokens: int) -> str:
        """Let out ``text``, that of the window without its last ``open_tokens``."""
        if text == self._out:  # such as a first space, which shows with what follows it
            return ""
        fresh = self._window[len(self._window) - self._held : len(self._window) - open_tokens]
        spoilt = not text.startswith(self._out)  # by a byte, and they are out already
        piece = self._decode(fresh) if spoilt else text[len(self._out) :]
        # The tokens just shown become the context of the next.
        self._window = self._window[len(self._window) - self._held :]
        self._held = open_tokens
        self._out = self._decode(fresh)
        return piece


def _core(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"not a readable tokenizer ({error})", path, "Download the file again."
            ) from error
    try:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        return slow.backend_tokenizer
    except Exception as error:  # what goes wrong there differs by version
        raise CheckpointError(
            f"no tokenizer.json, and transformers cannot make one ({error})",
            folder,
            "Add the model's tokenizer.json, or send token ids instead of text.",
        ) from error


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; tokenizer_config.json before special_tokens_map.json."""
    path = folder / "special_tokens_map.json"
    stated = {**(read_json(path) if path.is_file() else {}), **config}
    tokens: dict[str, str] = {}
    for name in SPECIAL:
        value = stated.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja before tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeError) as error:
            raise CheckpointError(
                f"cannot read the template ({error})", path, "Download it again."
            ) from error
    stated = config.get("chat_template")
    if isinstance(stated, str):
        return {"default": stated}
    named = stated if isinstance(stated, list) else []
    return {
        entry["name"]: entry["template"]
        for entry in named
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2):
    printable Latin-1 stands for itself, the others follow from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {
        chr(0x100 + i): byte for i, byte in enumerate(moved)
    }


_BYTE_OF = _byte_characters()
