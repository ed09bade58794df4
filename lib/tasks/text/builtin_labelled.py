"""Documents with labels that the project makes itself, for trying out judge and inspector: `data.path: builtin_labelled`.

Half of the documents are pieces of Python's documentation, by humans. A quarter are by a machine, and a quarter turn from human
to machine somewhere. The machine is a chain of words: it draws each word from those that follow the last one in the documentation
(a bigram model). Its texts are easy to recognise by their grammar, and hard by their words.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from lib import randomness

HUMAN, MACHINE = "human", "machine"
SEED = 2026
CHARACTERS = 240  # of a document, and the rest of its last word


def labelled_documents(texts: Mapping[str, str], count: int) -> Iterator[tuple[str, str, str, list]]:
    """(name, text, class, spans of machine text) of documents made from named texts, at most `count`."""
    pieces = [
        (f"{name}-{number}", text)
        for name, whole in texts.items()
        for number, text in enumerate(_pieces(whole))
    ][:count]
    followers: defaultdict[str, list[str]] = defaultdict(list)
    for _, text in pieces:
        words = text.split()
        for word, following in itertools.pairwise(words):
            followers[word].append(following)
    kinds = np.argsort(randomness.uniform(randomness.key(SEED, "kinds"), np.arange(len(pieces)), 1)[:, 0]) % 4
    for row, (name, text) in enumerate(pieces):
        words, kind = text.split(), int(kinds[row])
        if kind < 2:
            yield name, text, HUMAN, []
            continue
        draws = randomness.uniform(randomness.key(SEED, "words"), np.array([row]), CHARACTERS)[0]
        words = words[: 1 if kind == 2 else max(1, int(len(words) * (0.2 + 0.6 * draws[-1])))]
        start = len(" ".join(words)) + 1 if kind == 3 else 0
        size = len(" ".join(words))
        while size < CHARACTERS:  # as long as the documents by humans
            known = followers.get(words[-1]) or ["the"]
            words.append(known[int(draws[len(words)] * len(known))])
            size += len(words[-1]) + 1
        made = " ".join(words)
        yield name, made, MACHINE, [[start, len(made), MACHINE]]


def _pieces(text: str) -> Iterator[str]:
    """Runs of whole words of about CHARACTERS characters."""
    words: list[str] = []
    size = 0
    for word in text.split():
        words.append(word)
        size += len(word) + (size > 0)
        if size >= CHARACTERS:
            yield " ".join(words)
            words, size = [], 0
