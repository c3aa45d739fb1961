"""Token trees against the obvious reading of their parents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.speculation.tree import TokenTree


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(tokens, parents) of a tree of up to 80 nodes, sorted by depth."""
    depth, parents = [0], [-1]
    for _ in range(draw(st.integers(0, 79))):
        lowest = 0 if depth[-1] == 0 else depth.index(depth[-1] - 1)
        parent = draw(st.integers(lowest, len(parents) - 1))
        parents.append(parent)
        depth.append(depth[parent] + 1)
    tokens = draw(st.lists(st.integers(0, 9), min_size=len(parents), max_size=len(parents)))
    return tokens, parents


@given(trees())
def test_facts_of_a_tree(parts: tuple[list[int], list[int]]) -> None:
    tokens, parents = parts
    tree = TokenTree(tokens, parents)

    def path(node: int) -> list[int]:
        return [] if node < 0 else [*path(parents[node]), node]

    assert len(tree) == len(tokens)
    assert tree.depth == [len(path(node)) - 1 for node in range(len(tokens))]
    assert tree.ancestors() == [sum(1 << a for a in path(node)) for node in range(len(tokens))]
    for node in range(len(tokens)):
        assert tree.children(node) == [i for i, p in enumerate(parents) if p == node]
    assert tree.is_chain == (parents == list(range(-1, len(parents) - 1)))


def test_root_and_chain() -> None:
    assert TokenTree.root(7) == TokenTree([7], [-1]) == TokenTree.chain([7])
    assert TokenTree.root(7).is_chain
    chain = TokenTree.chain((7, 8, 8))
    assert chain.parent == [-1, 0, 1] and chain.depth == [0, 1, 2] and chain.is_chain
    assert not TokenTree([7, 8, 9], [-1, 0, 0]).is_chain


@pytest.mark.parametrize(
    ("tokens", "parents", "words"),
    [
        ([], [], "a tree needs a root"),
        ([1], [0], "a tree needs a root"),
        ([1, 2], [-1], "one parent for each token"),
        ([1, 2], [-1, -1], "node 1 has parent -1; parents come before children"),
        ([1, 2], [-1, 1], "node 1 has parent 1; parents come before children"),
        ([1, 2, 3], [-1, 2, 0], "node 1 has parent 2; parents come before children"),
        ([1, 2, 3, 4], [-1, 0, 1, 0], "node 3 breaks the order by depth"),
    ],
)
def test_no_tree(tokens: list[int], parents: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenTree(tokens, parents)
