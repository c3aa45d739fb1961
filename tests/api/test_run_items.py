"""Working through many items: turns, limits, and leaving in the middle."""

from __future__ import annotations

from hasten import LLM, SamplingParams
from hasten.api.run_items import ItemRunner
from hasten.bench.workloads import Item

FEW = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def test_each_turn_sees_the_answers_before_it(llm: LLM) -> None:
    item = Item("talk", turns=("One?", "Two?"))
    (event,) = [e for e in ItemRunner(llm.frontend, FEW).run([item]) if e.done]
    first, second = event.progress.results
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Two?"},
    ]
    assert first.prompt_token_ids == llm.chat_prompt(messages[:1])
    assert second.prompt_token_ids == llm.chat_prompt(messages)
    assert second.outputs[0].token_ids == llm.chat(messages, FEW)[0].outputs[0].token_ids


def test_long_prompts_are_refused_or_cut_on_the_left(llm: LLM) -> None:
    ids = [*[9] * 600, 5, 6, 7]
    items = [Item("long", tuple(ids)), Item("short", (5, 6, 7))]
    done = {e.progress.item.id: e.progress for e in ItemRunner(llm.frontend, FEW).run(items)}
    assert "600" not in str(done["short"].error) and done["short"].error is None
    assert "the prompt has 603 tokens" in str(done["long"].error)
    events = ItemRunner(llm.frontend, FEW, truncate=True).run(items)
    done = {e.progress.item.id: e.progress for e in events if e.done}
    kept = done["long"].results[0].prompt_token_ids
    assert kept == ids[-len(kept) :] and len(kept) == 512 - 4
    assert len(done["long"].results[0].outputs[0].token_ids) == 4


def test_items_are_taken_as_there_is_room(llm: LLM) -> None:
    taken = []

    def source() -> object:
        for i in range(200):
            taken.append(i)
            yield Item(str(i), (5, 6, 7 + i))

    runner = ItemRunner(llm.frontend, FEW, ahead=1)
    finished = 0
    for event in runner.run(source()):  # type: ignore[arg-type]
        finished += event.done
        assert len(taken) - finished <= llm.engine.config.max_sequences
    assert finished == len(taken) == 200


def test_leaving_in_the_middle_ends_what_is_on_its_way(llm: LLM) -> None:
    items = [Item(str(i), (5, 6, 7 + i)) for i in range(100)]
    for event in ItemRunner(llm.frontend, FEW).run(items):
        if event.done:
            assert llm.engine.requests
            break
    # the fixture asserts that nothing is left
