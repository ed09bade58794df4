"""Any text scored token by token: what critic, inspector and reference model say of it, as rows and as a page.

A text is read in consecutive windows of the models' context; nothing crosses a window. Windows of equal length go
through the models together, so that no padding is ever scored.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch

from lib import randomness
from lib.diffusion.policies import POLICIES
from lib.evaluation.quality import sequence_scores
from lib.report.html import page
from lib.report.html_table import table
from lib.tokenization import decode_batch, encode_batch
from lib.training.objectives.base import chunks, forward
from lib.training.objectives.next_token import causal_nll

BATCH = 64
SHOWN_WINDOWS, SHOWN_DOCUMENTS = 60, 200  # on the page; the table has all
HELD_OUT, REWRITTEN = "(held-out text of this run)", "(the same, half of it rewritten)"


@dataclass(frozen=True)
class Window:
    document_id: str
    number: int
    ids: np.ndarray  # (T,)


def windows(
    documents: Iterable[tuple[str, str]], tokenizer: Any, context: int, unknown: str
) -> Iterator[Window]:
    """The windows of (document id, text) pairs, document by document. `unknown`: as in `encode_batch`."""
    for document_id, text in documents:
        ids = np.asarray(encode_batch(tokenizer, [text], unknown)[0], np.int64)
        for number, start in enumerate(range(0, len(ids), context)):
            yield Window(document_id, number, ids[start : start + context])


def score(parts: list[Window], evaluator: Any) -> list[dict]:
    """A row of schema.SCORES for every window, in their order."""
    rows: list[dict | None] = [None] * len(parts)
    lengths = np.array([len(w.ids) for w in parts])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for chosen in chunks(len(same), BATCH):
            index = same[chosen]
            found = _score_equal(np.stack([parts[i].ids for i in index]), evaluator)
            for place, i in enumerate(index):
                rows[i] = _row(parts[i], evaluator, {name: v[place] for name, v in found.items()})
    return [row for row in rows if row is not None]


def known_texts(evaluator: Any, count: int = BATCH) -> list[Window]:
    """What the scores of a text may be held against: the run's own held-out text, and the same with a half rewritten.

    Up to `count` windows of each; every second token on average is masked and drawn anew by the generator.
    """
    real = evaluator.real_text(count)[:, : evaluator.narrowest]
    rows = np.arange(len(real))
    free = (
        randomness.uniform(randomness.key(evaluator.config.seed, "half rewritten"), rows, real.shape[1]) < 0.5
    )
    masked = np.where(free, evaluator.tokenizer.mask_token_id, real)
    rewritten = (
        evaluator.sampler.sample(masked, free, rows, POLICIES["ancestral"], 1).ids if len(real) else real
    )
    named = ((HELD_OUT, real), (REWRITTEN, rewritten))
    return [Window(name, number, ids) for name, texts in named for number, ids in enumerate(texts)]


@torch.no_grad()
def _score_equal(ids: np.ndarray, evaluator: Any) -> dict[str, np.ndarray]:
    """Scores of (B, T) ids: (B, T) per token, (B,) for the judge. Models that the run has not are left out."""
    runtime, cls_id = evaluator.runtime, evaluator.tokenizer.cls_token_id
    valid = np.ones_like(ids, bool)
    found = {"critic_error": evaluator.sampler.critic_error(ids)}
    if evaluator.inspector is not None:
        shares = torch.softmax(forward(evaluator.inspector, runtime, ids, valid).logits.float(), -1)
        found["inspector_changed"] = (1 - shares[..., 0]).cpu().numpy()
    if evaluator.reference is not None:
        found["reference_nll"] = causal_nll(evaluator.reference, runtime, ids, valid, cls_id)[0].cpu().numpy()
    if evaluator.judge is not None:
        found["judge_score"] = sequence_scores(evaluator.judge, runtime, ids, cls_id)
    return found


def _row(window: Window, evaluator: Any, found: dict[str, np.ndarray]) -> dict:
    per_token = ("critic_error", "inspector_changed", "reference_nll")
    row: dict = {
        "document_id": window.document_id,
        "window": window.number,
        "text": decode_batch(evaluator.tokenizer, [window.ids])[0],
        "token_ids": window.ids.tolist(),
        "judge_score": float(found["judge_score"]) if "judge_score" in found else None,
    }
    for name in per_token:
        row[name] = found[name].tolist() if name in found else None
        row[f"{name}_mean"] = float(found[name].mean()) if name in found else None
    return row


def documents_of(rows: list[dict]) -> list[dict]:
    """Means over each document, weighted by tokens: a line per document."""
    windows_of: dict[str, list[dict]] = {}
    for row in rows:
        windows_of.setdefault(row["document_id"], []).append(row)
    lines = []
    for name, these in windows_of.items():
        weights = np.array([len(row["token_ids"]) for row in these])
        line: dict = {"document_id": name, "tokens": int(weights.sum())}
        for key in ("critic_error_mean", "inspector_changed_mean", "reference_nll_mean", "judge_score"):
            values = [row[key] for row in these]
            line[key] = None if values[0] is None else float(np.average(values, weights=weights))
        lines.append(line)
    return lines


HEAD = ("document", "tokens", "critic: wrong", "inspector: changed", "reference NLL", "judge")


def cells(line: dict) -> tuple[str, ...]:
    """A document's line as text."""
    numbers = [
        line[k] for k in ("critic_error_mean", "inspector_changed_mean", "reference_nll_mean", "judge_score")
    ]
    return line["document_id"], f"{line['tokens']:,}", *("-" if n is None else f"{n:.3f}" for n in numbers)


def scores_page(
    rows: list[dict], documents: list[dict], known: list[dict], token_text: Any, source: str
) -> str:
    """The heat maps: the text once per model that scores tokens, every token tinted by its number.

    `documents`, `known`: the lines of `documents_of`, and of the texts that one may hold it against.
    """
    lines = [[escape(c) for c in cells(line)] for line in (*documents[:SHOWN_DOCUMENTS], *known)]
    body = f"<header><h1>{escape(source)}</h1><p class='hint'>Every token as the models of this run see it. "
    body += "Critic: chance that it is wrong. Inspector: chance that it was changed. The redder, the likelier.</p></header>"
    more = len(documents) - SHOWN_DOCUMENTS
    rest = f"<p class='hint'>And {more:,} more; scores.parquet has all.</p>" if more > 0 else ""
    body += "<section><h2>Whole texts</h2>" + table(list(HEAD), lines) + rest + "</section>"
    for key, title in (("critic_error", "Critic"), ("inspector_changed", "Inspector")):
        if rows and rows[0][key] is not None:
            shown = "".join(_heat(row, key, token_text) for row in rows[:SHOWN_WINDOWS])
            body += f"<section><h2>{title}</h2>{shown}</section>"
    if len(rows) > SHOWN_WINDOWS:
        body += (
            f"<p class='hint'>The first {SHOWN_WINDOWS} of {len(rows)} windows; scores.parquet has all.</p>"
        )
    return page(f"Remask: {source}", body)


def _heat(row: dict, key: str, token_text: Any) -> str:
    parts = [
        f'<span class="heat" style="--p:{value:.2f}" title="{value:.2f}">{escape(token_text(token))}</span>'
        for token, value in zip(row["token_ids"], row[key], strict=True)
    ]
    return f"<h3>{escape(row['document_id'])}, window {row['window']}</h3><pre>{''.join(parts)}</pre>"
