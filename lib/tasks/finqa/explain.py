"""A short explanation of one answered question, for the report."""

import math


def explain(row: dict) -> str:
    """Whether the chosen program is right, and how its answer differs.

    Args:
        row: `chosen_value`, `best_value` (texts), `chosen_kind`, and `reward` of the chosen candidate.
    """
    chosen, best = row["chosen_value"], row["best_value"]
    if row["reward"] >= 1 or chosen == best:
        return f"right: {best}"
    words = {
        "page_gold": "it answers another question of the page",
        "chain": "it is a changed version of the right program",
    }
    parts = [f"answered {chosen}, right is {best}", *_relation(chosen, best)]
    if row["chosen_kind"] in words:
        parts.append(words[row["chosen_kind"]])
    return "; ".join(parts)


def _relation(chosen: str | None, best: str | None) -> list[str]:
    """How a wrong number relates to the right one, if a simple relation holds."""
    try:
        wrong, right = float(chosen or ""), float(best or "")
    except ValueError:
        return []
    if not wrong or not right:
        return []
    quotient = wrong / right
    for factor, words in ((-1, "the sign is wrong"), (100, "100 times too large"), (0.01, "100 times too small"),
                          (1000, "1,000 times too large"), (0.001, "1,000 times too small")):  # fmt: skip
        if math.isclose(quotient, factor, rel_tol=0.005):
            return [words]
    off = abs(quotient - 1)
    return [f"off by {off:.0%}"] if off < 0.5 else []
