"""The words of a text, for measures that compare texts without a model."""

import itertools
import re

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_RUN = re.compile(rf"([{_UNSPACED}]+)|[^\W{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words in lower case, in order. A run of a script without spaces gives its pairs of adjacent characters."""
    words: list[str] = []
    for match in _RUN.finditer(text.lower()):
        run = match[0]
        if match[1] is None or len(run) == 1:
            words.append(run)
        else:
            words += map("".join, itertools.pairwise(run))
    return words
