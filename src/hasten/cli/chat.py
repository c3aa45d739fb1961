"""``hasten chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hasten.cli import options as o
from hasten.stack import with_weights

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def chat(
    model: o.Model = "reference",
    stack: o.StackText = None,
    weights: o.WeightsText = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: o.MaxTokens = 512,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    max_length: o.MaxLength = None,
    kv_bytes: o.KvBytes = None,
    threads: o.Threads = None,
    device: o.Device = "cpu",
) -> None:
    """Talk to a model. Earlier turns stay in the prefix cache, so only new text is computed."""
    with o.one_line_errors():
        stack = with_weights(stack, weights)
        o.set_threads(threads)
        params = o.sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
        from hasten.api.llm import LLM

        llm = LLM(
            model,
            stack=stack,
            max_sequences=1,
            max_length=max_length,
            kv_bytes=kv_bytes,
            device=device,
            progress=True,
        )
        if not llm.tokenizer.has_chat_template:
            o.fail(f"{model} has no chat template; use 'hasten generate'")
        if sys.stdin.isatty():
            print(f"{model}. {HELP}.", file=sys.stderr)
        first = [{"role": "system", "content": system}] if system else []
        messages = list(first)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            if text.strip() in ("/quit", "/exit"):
                return
            if text.strip() == "/reset":
                messages = list(first)
                continue
            if not text.strip():
                continue
            messages.append({"role": "user", "content": text})
            answer = ""
            try:
                for piece in llm.stream(llm.chat_prompt(messages), params):
                    print(piece.text, end="", flush=True)
                    answer += piece.text
                    if piece.error:
                        raise ValueError(piece.error)
            except KeyboardInterrupt:
                print(" (stopped)", end="")
            except ValueError as error:  # mostly: the conversation no longer fits
                messages.pop()
                print(f"hasten: {error}; /reset starts over", file=sys.stderr)
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
