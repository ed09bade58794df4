"""Text with every token tinted by a probability: the heat maps of the reports."""

from collections.abc import Callable, Iterable
from html import escape

# The colours of the probabilities 0.0 to 1.0, for a legend
SCALE = " ".join(f'<span class="tint" style="--p:{p / 10}">{p / 10:.1f}</span>' for p in range(0, 11, 2))


def tinted(token_ids: Iterable[int], probabilities: Iterable[float], token_text: Callable[[int], str]) -> str:
    """The tokens as HTML; the redder a token, the higher its probability."""
    return "".join(
        f'<span class="tint" style="--p:{p:.2f}" title="{p:.2f}">{escape(token_text(token))}</span>'
        for token, p in zip(token_ids, probabilities, strict=True)
    )
