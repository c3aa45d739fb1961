"""From texts and conversations to token ids: the side of the model that the HTTP process has."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hasten.models.chat_template import ChatTemplate, ChatTemplateError
from hasten.models.tokenizer import Tokenizer
from hasten.serving.bodies import check_depth, too_long
from hasten.serving.config import ServeConfig
from hasten.serving.errors import invalid
from hasten.serving.messages import EngineFacts
from hasten.serving.openai_requests import ChatRequest, Prompts, TokenizeRequest, cap

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Prompter:
    """The tokenizer and the chat template of the served model. Safe to use from any thread.

    Attributes:
        longest_text: bytes that a prompt may have at most: the longest token's, as many times as
            tokens fit. A longer text is refused without being tokenized.
    """

    def __init__(self, facts: EngineFacts, config: ServeConfig) -> None:
        self.facts = facts
        self.config = config
        self.tokenizer = Tokenizer.load(facts.folder)
        self.bytes_of = lru_cache(maxsize=1 << 16)(self.tokenizer.token_bytes)
        self.special = frozenset(
            token
            for token, about in self.tokenizer.core.get_added_tokens_decoder().items()
            if about.special
        )
        vocabulary = self.tokenizer.core.get_vocab(with_added_tokens=True)
        self.longest_text = facts.max_length * max(
            (len(text.encode("utf-8", "replace")) for text in vocabulary), default=1
        )
        self.most_tokens = max(config.queued_tokens(facts), facts.max_length)

    # ---- texts --------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. (Encoding a batch lets other threads run, encoding one text does not.)"""
        size = len(text.encode()) if len(text) * 4 > self.longest_text else 0
        if size > self.longest_text:
            raise too_long(size, self.longest_text)
        core = self.tokenizer.core
        ids: list[int] = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[
            0
        ].ids
        return ids

    def prompts(
        self,
        given: Prompts,
        field: str,
        *,
        add_special_tokens: bool | None,
        truncate: int | None,
        max_tokens: int | None,
    ) -> tuple[list[list[int]], list[str | None]]:
        """Token ids of each prompt, and its text where it was given as text and not cut; options
        as for `fit`."""
        if isinstance(given, str):
            many: list[Any] = [given]
        elif given and all(isinstance(item, int) for item in given):
            many = [given]
        else:
            many = given
            if not many:
                raise invalid(f"{field} is empty", field)
            if len({type(item) for item in many}) > 1:
                raise invalid(
                    f"{field}: expected a text, a list of texts, a list of token ids, or a list "
                    "of lists of token ids",
                    field,
                )
        cap(field, len(many), "max_prompts", self.config.max_prompts)
        special = add_special_tokens is not False
        all_ids: list[list[int]] = []
        texts: list[str | None] = []
        total = 0
        for i, one in enumerate(many):
            name = field if len(many) == 1 else f"{field}[{i}]"
            ids = self.encode(one, special) if isinstance(one, str) else one
            kept = self.fit(ids, name, truncate, max_tokens)
            texts.append(one if isinstance(one, str) and len(kept) == len(ids) else None)
            all_ids.append(kept)
            total += len(kept)
            if total > self.most_tokens:
                raise invalid(
                    f"{field}: more tokens than max_queued_tokens={self.most_tokens}; send fewer "
                    "prompts in a request",
                    field,
                )
        return all_ids, texts

    def fit(
        self, ids: list[int], field: str, truncate: int | None, max_tokens: int | None
    ) -> list[int]:
        """A prompt that the engine will take, or ApiError (400).

        Args:
            truncate: keep that many of the last tokens; -1 = as many as leave room for the
                answer; None = all.
            max_tokens: of the answer; None = what is left.
        """
        most = self.facts.max_length
        if truncate is not None:
            if truncate < -1 or truncate == 0:
                raise invalid(
                    "truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens"
                )
            keep = most - (1 if max_tokens is None else max_tokens) if truncate == -1 else truncate
            if keep < 1:
                raise invalid(f"max_tokens leaves no room for a prompt in {most}", "max_tokens")
            ids = ids[-keep:]
        if not ids:
            raise invalid(f"{field} is empty: give at least one token", field)
        self.check_ids(ids, field)
        answer = 1 if max_tokens is None else max_tokens
        if answer >= most > len(ids):
            raise invalid(
                f"max_tokens is {answer if answer < 10**12 else 'far more'}, but the context of "
                f"this model is max_length={most} for prompt and answer together, and {field} has "
                f"{len(ids)} tokens; send at most {most - len(ids)}",
                "max_tokens",
                "context_length_exceeded",
            )
        if len(ids) + answer > most:
            asked = f"and {answer} were asked for" if max_tokens else "and one is needed at least"
            raise invalid(
                f"{field} has {len(ids)} tokens {asked if answer else ''}, but the context of "
                f"this model is max_length={most}; shorten it or send truncate_prompt_tokens=-1",
                field,
                "context_length_exceeded",
            )
        return ids

    # ---- conversations ------------------------------------------------------------------------

    def conversation(self, request: ChatRequest | TokenizeRequest) -> list[int]:
        """The token ids that a conversation becomes."""
        return self.encode(self.conversation_text(request), bool(request.add_special_tokens))

    def conversation_text(self, request: ChatRequest | TokenizeRequest) -> str:
        messages = self._messages(request.messages or [])
        variables: dict[str, Any] = dict(request.chat_template_kwargs or {})
        if isinstance(request, ChatRequest):
            if request.documents is not None:
                variables["documents"] = request.documents
            if request.reasoning_effort is not None:
                variables["reasoning_effort"] = request.reasoning_effort
        for name, value in (("tools", request.tools), ("chat_template_kwargs", variables)):
            check_depth(name, value, self.config.max_json_depth)
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in variables:
                raise invalid(f"chat_template_kwargs cannot set {name}", "chat_template_kwargs")
        for name in ("tools", "documents"):
            if getattr(request, name, None) and not self.takes(name, request):
                raise invalid(f"this model's chat template takes no {name}", name, "unsupported")
        ready = request.add_generation_prompt
        marker = ""
        if request.continue_final_message:
            if ready:
                raise invalid(
                    "add_generation_prompt and continue_final_message exclude each other",
                    "continue_final_message",
                )
            if not isinstance(messages[-1].get("content"), str):
                raise invalid("the message to continue has no text", "continue_final_message")
            # Templates write things after a message, and trim it: the text is cut at a marker.
            marker = f"<{secrets.token_hex(16)}>"
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + marker}
            ready = False
        try:
            text = self._template(request)(
                messages,
                add_generation_prompt=ready is not False,
                tools=request.tools or None,
                **variables,
            )
        except ChatTemplateError as error:
            raise invalid(str(error), "messages", "chat_template") from error
        except (TypeError, RecursionError) as error:
            raise invalid(
                "chat_template_kwargs cannot be given to the template", "chat_template_kwargs"
            ) from error
        if marker:
            text, found, _ = text.partition(marker)
            if not found:
                raise invalid(
                    "this model's chat template does not show the message to continue",
                    "continue_final_message",
                )
        return text

    def _messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not messages:
            raise invalid("messages is empty", "messages")
        cap("messages", len(messages), "max_messages", self.config.max_messages)
        check_depth("messages", messages, self.config.max_json_depth)
        checked = []
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise invalid(
                    f"messages[{i}].role: expected one of {', '.join(ROLES)}", f"messages[{i}].role"
                )
            if isinstance(content, list):
                for part in content:
                    kind = part.get("type") if isinstance(part, dict) else None
                    if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
                        raise invalid(
                            f"messages[{i}].content: only text parts are supported",
                            f"messages[{i}].content",
                        )
            elif not isinstance(content, str) and not (
                content is None and role == "assistant" and message.get("tool_calls")
            ):
                raise invalid(
                    f"messages[{i}].content: expected a text or a list of text parts",
                    f"messages[{i}].content",
                )
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
                raise invalid(
                    f"messages[{i}].tool_calls: expected a list of objects",
                    f"messages[{i}].tool_calls",
                )
            name = "system" if role == "developer" else role
            checked.append({**message, "role": name, "content": "" if content is None else content})
        return checked

    def _template(self, request: ChatRequest | TokenizeRequest) -> Any:
        if request.chat_template is None:
            return self.tokenizer.chat_text
        if not self.config.trust_request_chat_template:
            raise invalid(
                "chat_template in a request is off; the server allows it with "
                "--trust-request-chat-template",
                "chat_template",
                "unsupported",
            )
        return ChatTemplate(request.chat_template, self.tokenizer.special_tokens).render

    def takes(self, variable: str, request: ChatRequest | TokenizeRequest) -> bool:
        """Whether the template reads a variable."""
        if request.chat_template is not None:
            return variable in request.chat_template
        return any(variable in source for source in self.tokenizer.chat_templates.values())

    def check_ids(self, ids: list[int], field: str) -> None:
        """Raises ApiError (400) for ids that the model does not have."""
        if ids and (min(ids) < 0 or max(ids) >= self.facts.vocab_size):
            raise invalid(f"{field} has token ids outside 0..{self.facts.vocab_size - 1}", field)

    # ---- tokens -------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens)

    def token_text(self, token: int) -> str:
        """A token as text; what is no whole character shows as the replacement character."""
        return self.bytes_of(token).decode("utf-8", errors="replace")
