"""A language model of the smallest kind: which word follows which, counted in one text when it starts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus.txt")
"""The opening of Alice's Adventures in Wonderland (1865), which is in the public domain."""


class NGram:
    """``order``: how many words it looks back. More is closer to the book, fewer is wilder."""

    def __init__(self, text: str, order: int = 2) -> None:
        if order < 1:
            raise ValueError("order is at least 1")
        self.order = order
        self.words = text.split()
        self.following: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for length in range(order + 1):  # shorter contexts too: for a prompt that the book does not have
            for i in range(len(self.words) - length):
                self.following[tuple(self.words[i : i + length])].append(self.words[i + length])

    def generate(self, prompt: str, seed: int | None = None) -> Iterator[str]:
        """Words without end; the same seed gives the same ones."""
        chooser = random.Random(seed)
        context = tuple(prompt.split())
        while True:
            context = context[-self.order :]
            while context not in self.following:
                context = context[1:]
            word = chooser.choice(self.following[context])
            yield word
            context = (*context, word)
