"""Pools that the project makes itself, for quick tests: which sentence follows in Python's language reference?

The prompt is a sentence of a paragraph. The right candidate is the sentence behind it. The others are sentences of other
paragraphs, most of them of the same topic. Pools have 2 to 9 candidates.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from lib import randomness
from lib.tasks.pools.layouts import Entry, PoolRow

BUILTIN = {"builtin": 2500, "builtin_small": 240}  # data.path: number of pools
NAME = "pydoc_data.topics"
SOURCE = Path(__file__)
_SENTENCE = re.compile(r"(?<=[a-z)`])\.\s+(?=[A-Z])")
_MOST = 8  # wrong candidates
SHORTEST, LONGEST = 30, 260  # characters of a sentence


def pool_rows(path: str) -> Iterator[PoolRow]:
    """The pools, the same in every call."""
    from pydoc_data.topics import topics

    following: list[tuple[str, str, str]] = []  # topic, sentence, the next one
    for topic, text in topics.items():
        for paragraph in text.split("\n\n"):
            sentences = [
                s for s in _SENTENCE.split(" ".join(paragraph.split())) if SHORTEST <= len(s) <= LONGEST
            ]
            following += [(topic, a, b) for a, b in zip(sentences[:-1:2], sentences[1::2], strict=False)]
    draws = randomness.uniform(randomness.key(0, "builtin pools"), range(len(following)), 2 + 2 * _MOST)
    seen: set[str] = set()
    count = 0
    stride = max(1, len(following) // BUILTIN[path])
    for number, (topic, sentence, answer) in list(enumerate(following))[::stride]:
        if sentence in seen or count == BUILTIN[path]:
            continue
        seen.add(sentence)
        count += 1
        near = [n for n, (other, _, _) in enumerate(following) if other == topic and n != number]
        size = 1 + int(draws[number, 0] * _MOST)
        texts = [answer]
        for share, where in zip(draws[number, 2 : 2 + size], draws[number, 2 + _MOST :], strict=False):
            source = near if near and share < 0.7 else range(len(following))
            other = following[source[int(where * len(source))]][2]
            if other not in texts:
                texts.append(other)
        if len(texts) < 2:
            texts.append(following[(number + 1) % len(following)][1])
        place = int(draws[number, 1] * len(texts))
        order = [*texts[1 : place + 1], answer, *texts[place + 1 :]]
        entries = [Entry(text, float(text == answer)) for text in order]
        yield PoolRow(f"builtin-{number}", sentence, entries)
