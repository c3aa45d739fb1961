"""``hasten generate``: one prompt, text as it comes, one line of figures."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hasten.cli import options as o
from hasten.stack import with_weights


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")
    ] = None,
    model: o.Model = "reference",
    stack: o.StackText = None,
    weights: o.WeightsText = None,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Outputs to generate.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    figures: Annotated[bool, typer.Option(help="Print the line of figures at the end.")] = True,
    profile: o.Profile = False,
    max_length: o.MaxLength = None,
    kv_bytes: o.KvBytes = None,
    threads: o.Threads = None,
    device: o.Device = "cpu",
) -> None:
    """Complete one prompt. Text goes to standard output, figures to standard error.

    Example: hasten generate 'def add(a, b):' --stack draft=prompt-lookup
    """
    with o.one_line_errors():
        stack = with_weights(stack, weights)
        if prompt is None or prompt == "-":
            if sys.stdin.isatty():
                o.fail("give a prompt, or pipe one in: echo 'import os' | hasten generate")
            prompt = sys.stdin.read()
        o.set_threads(threads)
        params = o.sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            n=n,
        )
        from hasten.api.figures import line_of_figures
        from hasten.api.llm import LLM

        llm = LLM(
            model,
            stack=stack,
            max_sequences=n,
            max_length=max_length,
            kv_bytes=kv_bytes,
            device=device,
            progress=True,
        )
        given = llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
        with o.profiled(llm.engine, profile):
            if n == 1:
                for piece in llm.stream(given, params):
                    print(piece.text, end="", flush=True)
                    if piece.error:
                        raise ValueError(piece.error)
                print(flush=True)
            else:
                for output in llm.generate(given, params)[0].outputs:
                    print(f"--- {output.index} ({output.finish_reason})\n{output.text}")
        if figures:
            print(line_of_figures(llm), file=sys.stderr)
