"""Score a text token by token with the critic, the inspector and the reference model, and as a whole with the judge.

A text is read in consecutive windows of the models' context; no model sees beyond its window. Windows of equal length
are scored together, so that no padding is needed.

Legend: B windows, T tokens.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import metrics, randomness
from lib.config import Config
from lib.detection import JOINS, Calibration, Windows, log_odds
from lib.diffusion.policies import POLICIES
from lib.diffusion.samples import MaskedTexts
from lib.errors import BadConfig, BadData, MissingInput, RemaskError
from lib.evaluation.quality import sequence_scores
from lib.evaluation.run_models import roles_of
from lib.examples import leaves_out_unknown, without_unknown
from lib.log import say
from lib.tasks import Document, Problem, get_task
from lib.tasks.text.check import check
from lib.tokenization import decode_batch, encode_batch
from lib.training.objectives.base import chunks, forward
from lib.training.objectives.next_token import causal_nll
from lib.user_files.faults import kind_of
from lib.user_files.rows import read_rows

BATCH = 64
NO_LABEL = "no label"
LABEL_PROBLEMS = (NO_LABEL, "unknown class", "label not a number", "label not finite", "label out of range")
HELD_OUT, REWRITTEN = "(held-out text of this run)", "(the same text, half of it rewritten)"

IGNORED = (
    "data.text_key",
    "data.id_key",
    "data.drop",
)  # the user's file may have other columns than the run's

# Settings under which every text is read whole. The minimum amounts are for training
READ_WHOLE: dict[str, Any] = {
    "min_document_characters": 1,
    "passage_characters": 1,
    "split": "contiguous",
    "fractions": {"train": 1.0},
    "deduplicate": "none",
    "label_key": None,
    "label_classes": None,
    "spans_key": None,
    "span_classes": None,
    "group_key": None,
}


@dataclass(frozen=True)
class UserTexts:
    """What a user gave to --score.

    Attributes:
        texts: (document id, text) of each document.
        problems: what could not be read, or was changed.
        files: the files that were read.
        synthetic: document id -> whether its label is that of a synthetic document, where the file has the run's label column.
    """

    texts: list[tuple[str, str]]
    problems: list[Problem]
    files: list[Path]
    synthetic: dict[str, bool]


def read_user_texts(config: Config, path: Path) -> UserTexts:
    """Read the texts of a file or folder, as task text does, whatever the run's task is.

    Raises:
        BadConfig: the run has no models that score text.
        BadData: no text is left.
        MissingInput: there is no such file or folder.
    """
    if config.critic.method != "token_critic" and not config.only_detects:
        raise BadConfig(
            f"--score needs critic.method token_critic, or labels beside the text; with {config.critic.method}, no model reads "
            "single tokens; --rank FILE ranks candidates by a trained ranker"
        )
    if config.only_detects and not any(
        roles_of(config)[role] for role in ("reference", "inspector", "judge")
    ):
        raise BadConfig(
            "--score needs a judge, an inspector or a reference model, and models has none of them"
        )
    if not path.exists():
        raise MissingInput(f"--score {path}: there is no such file or folder")
    # A file whose name begins with "builtin" is a file, not a text that the project ships
    name = os.path.join(".", path) if str(path).startswith("builtin") else str(path)
    of_labels = {k: getattr(config.data, k) for k in ("label_key", "label_classes")}
    changes = {"path": name, **READ_WHOLE} | (of_labels if _may_have(path, config.data.label_key) else {})
    config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    try:
        files, items = get_task("text").sources(config), list(check(config, keeps_unlabelled=True))
    except RemaskError as error:  # the message names the setting, but the user gave the flag
        raise type(error)(str(error).replace("data.path", "--score")) from None
    documents = [item for item in items if isinstance(item, Document)]
    texts = [
        (name, "".join(piece.content for piece in pieces))
        for name, pieces in itertools.groupby(documents, key=lambda document: document.document_id)
    ]
    problems = [
        p for p in items if isinstance(p, Problem) and p.kind not in ("too little text", *LABEL_PROBLEMS)
    ]
    problems += _of_labels([p for p in items if isinstance(p, Problem) and p.kind in LABEL_PROBLEMS])
    found = ((d.document_id, d.label) for d in documents if d.label is not None and not d.piece)
    named = config.data.label_classes is not None
    synthetic = {name: label != 0 if named else label < 1 for name, label in found}
    if not texts:
        raise BadData(f"--score {path}: there is no text to score")
    return UserTexts(texts, problems, files, synthetic)


def _of_labels(problems: list[Problem]) -> list[Problem]:
    """One problem for all labels that cannot be used. A row without a label is none: only some may have one."""
    wrong = [p for p in problems if p.kind != NO_LABEL]
    if not wrong:
        return []
    found = f"{len(wrong):,} labels cannot be used, the first one {wrong[0].found}"
    advice = f"expected {wrong[0].expected}; these texts get scores, but do not count in the rates"
    return [replace(wrong[0], severity="warning", kind="label", found=found, advice=advice)]


def _may_have(path: Path, key: str | None) -> bool:
    """Whether rows of a file may have a value under a key. The rows of a table have the columns of the first one."""
    if key is None or not path.is_file() or (kind := kind_of(path).removesuffix(".gz")) in ("", ".txt"):
        return False
    if kind in (".json", ".jsonl"):
        return True
    row = next(read_rows(path, wanted=[key]), None)
    return row is not None and isinstance(row.value, dict) and key in row.value


def measured_rates(
    documents: list[dict], synthetic: Mapping[str, bool], figures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The judge's rates on labelled documents at each threshold: {"target", "fpr", "tpr", "originals", "synthetic"}.

    Args:
        documents: rows of `documents_of`.
        synthetic: document id -> its label; documents without one do not count.
        figures: of the judge, see `documents_of`. A rate of no documents is None.
    """
    known = [d for d in documents if d["document_id"] in synthetic]
    truth = np.array([synthetic[d["document_id"]] for d in known], bool)
    found = []
    for target in (rates["target"] for rates in figures["thresholds"]):
        alarm = np.array([(at := d["alarm_at"]) is not None and at <= target for d in known], bool)
        rates = {
            name: metrics.ratio(
                alarm[of].astype(float), np.ones(int(of.sum())), limits=metrics.SHARE
            )._asdict()
            if of.any()
            else None
            for name, of in (("fpr", ~truth), ("tpr", truth))
        }
        found.append(
            {"target": target, "originals": int((~truth).sum()), "synthetic": int(truth.sum()), **rates}
        )
    return found


@dataclass(frozen=True)
class Window:
    document_id: str
    number: int
    ids: np.ndarray  # (T,)


def windows(
    documents: Iterable[tuple[str, str]],
    tokenizer: Any,
    context: int,
    unknown: str,
    characters: int | None = None,
) -> Iterator[Window]:
    """The windows of (document id, text) pairs, document by document.

    Args:
        context: most tokens of a window.
        unknown: as in `encode_batch`.
        characters: windows have equal lengths of about this many characters at most, as those that the judge learned from.
            None: they have `context` tokens.
    """
    for document_id, text in documents:
        ids = np.asarray(encode_batch(tokenizer, [text], unknown)[0], np.int64)
        starts = list(range(0, len(ids), context))
        if characters is not None:
            count = max(len(starts), -(-len(text) // characters)) if len(ids) else 0
            starts = [len(ids) * i // count for i in range(count)]
        for number, (start, end) in enumerate(itertools.pairwise([*starts, len(ids)])):
            yield Window(document_id, number, ids[start:end])


def windows_for(texts: Sequence[tuple[str, str]], evaluator: Any) -> tuple[list[Window], int]:
    """(the windows of (document id, text) pairs, as long as the models of the run read them; words left out).

    Words are left out as in training, see `leaves_out_unknown`. A text of such words alone keeps them, as [UNK].
    """
    config, tokenizer = evaluator.config, evaluator.tokenizer
    characters = config.data.passage_characters if config.data.has_labels else None
    left_out = 0
    if leaves_out_unknown(config):
        names, contents = [name for name, _ in texts], [text for _, text in texts]
        known, ids, left_out = without_unknown(tokenizer, contents, encode_batch(tokenizer, contents, "unk"))
        kept = [text if len(i) else whole for whole, text, i in zip(contents, known, ids, strict=True)]
        texts = list(zip(names, kept, strict=True))
    return list(
        windows(texts, tokenizer, evaluator.min_context, config.tokenizer.unknown, characters)
    ), left_out


def say_left_out(words: int) -> None:
    if words:
        say(f"words that the tokenizer does not know: {words:,}; they are left out, as in training")


def cut(user: UserTexts, evaluator: Any) -> list[Window]:
    """The windows of a user's texts. Says what the user must know about them."""
    parts, left_out = windows_for(user.texts, evaluator)
    say_left_out(left_out)
    unknown = sum(int((part.ids == evaluator.tokenizer.unk_token_id).sum()) for part in parts)
    if unknown:
        say(f"tokens outside the run's vocabulary: {unknown:,}; the models read them as [UNK]")
    if said := about_windows(parts, len(user.texts), evaluator):
        say(said)
    return parts


def about_windows(parts: Sequence[Window], texts: int, evaluator: Any) -> str | None:
    """What a user must know about texts of several windows; None if there are none. `texts`: how many there are."""
    context, join = evaluator.min_context, evaluator.judge_figures.get("join", "mean")
    of_judge = None if evaluator.judge is None else evaluator.judge.config.max_position_embeddings - 1
    longer = sum(part.number == 1 for part in parts)
    if not longer:
        return None
    said = (
        f"texts of several windows: {longer:,} of {texts:,}; a window has at most {context} tokens, and a text's score is the mean "
        f"over its tokens; windows are joined for the judge by: {join}"
    )
    if of_judge is not None and of_judge > context:
        said += f"; the judge learned from up to {of_judge}, so its thresholds may not hold"
    return said


def score(parts: list[Window], evaluator: Any) -> list[dict]:
    """A row of schema.SCORES for every window, in their order."""
    rows: list[dict | None] = [None] * len(parts)
    lengths = np.array([len(w.ids) for w in parts])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for chosen in chunks(len(same), BATCH):
            index = same[chosen]
            found = _score_equal(np.stack([parts[i].ids for i in index]), evaluator)
            for b, i in enumerate(index):
                rows[i] = _row(parts[i], evaluator, {name: v[b] for name, v in found.items()})
    return [row for row in rows if row is not None]


def known_texts(evaluator: Any, count: int = BATCH) -> list[Window]:
    """Texts to compare a score with: held-out text of the run, and the same text with half of it rewritten.

    Up to `count` windows of each. On average every second token is masked and sampled again by the generator. Nothing for a run
    without a generator.
    """
    if evaluator.sampler is None:
        return []
    real = evaluator.real_text(count)[:, : evaluator.min_context]
    rows = np.arange(len(real))
    free = (
        randomness.uniform(randomness.key(evaluator.config.seed, "half rewritten"), rows, real.shape[1]) < 0.5
    )
    masked = np.where(free, evaluator.tokenizer.mask_token_id, real)
    rewritten = (
        evaluator.sampler.sample(MaskedTexts(masked, free, rows), POLICIES["ancestral"], 1).ids
        if len(real)
        else real
    )
    named = ((HELD_OUT, real), (REWRITTEN, rewritten))
    return [Window(name, number, ids) for name, texts in named for number, ids in enumerate(texts)]


@torch.no_grad()
def _score_equal(ids: np.ndarray, evaluator: Any) -> dict[str, np.ndarray]:
    """Scores of (B, T) ids: (B, T) per token, (B,) of the judge. Models that the run lacks are skipped."""
    runtime, cls_id = evaluator.runtime, evaluator.tokenizer.cls_token_id
    valid = np.ones_like(ids, bool)
    found = {} if evaluator.sampler is None else {"critic_error": evaluator.sampler.critic_error(ids)}
    if evaluator.inspector is not None:
        probabilities = torch.softmax(forward(evaluator.inspector, runtime, ids, valid).logits.float(), -1)
        found["inspector_changed"] = (1 - probabilities[..., 0]).cpu().numpy()
    if evaluator.reference is not None:
        found["reference_nll"] = causal_nll(evaluator.reference, runtime, ids, valid, cls_id)[0].cpu().numpy()
    if evaluator.judge is not None:
        found["judge_score"] = sequence_scores(evaluator.judge, runtime, ids, cls_id)
        found["judge_suspicion"] = 1 - found["judge_score"]
        if (classes := evaluator.judge.config.num_labels) > 2:
            first = (1.0, *[0.0] * (classes - 1))
            found["judge_suspicion"] = 1 - sequence_scores(evaluator.judge, runtime, ids, cls_id, first)
    return found


def _row(window: Window, evaluator: Any, found: dict[str, np.ndarray]) -> dict:
    per_token = ("critic_error", "inspector_changed", "reference_nll")
    row: dict = {
        "document_id": window.document_id,
        "window": window.number,
        "text": decode_batch(evaluator.tokenizer, [window.ids])[0],
        "token_ids": window.ids.tolist(),
    }
    for name in ("judge_score", "judge_suspicion"):
        row[name] = float(found[name]) if name in found else None
    for name in per_token:
        row[name] = found[name].tolist() if name in found else None
        row[f"{name}_mean"] = float(found[name].mean()) if name in found else None
    return row


def documents_of(rows: list[dict], judge: Mapping[str, Any] | None = None) -> list[dict]:
    """One row per document: means over its windows, weighted by their tokens.

    Args:
        judge: held-out figures of the judge, which say how its windows are joined. With `detection`, rows have a
            `synthetic_probability`, and `alarm_at`: the lowest rate of false alarms at which the document is flagged, or None.
    """
    judge = judge or {}
    how, figures = judge.get("join", JOINS[0]), judge.get("detection")
    windows_of: dict[str, list[dict]] = {}
    for row in rows:
        windows_of.setdefault(row["document_id"], []).append(row)
    documents = []
    for name, these in windows_of.items():
        weights = np.array([len(row["token_ids"]) for row in these])
        document: dict = {"document_id": name, "tokens": int(weights.sum())}
        for key in ("critic_error_mean", "inspector_changed_mean", "reference_nll_mean"):
            values = [row[key] for row in these]
            document[key] = None if values[0] is None else float(np.average(values, weights=weights))
        document |= _judged(these, weights, how, figures)
        documents.append(document)
    return documents


def _judged(
    these: list[dict], weights: np.ndarray, how: str, figures: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the judge says of a document: its score and, with `figures`, a probability and the verdict at the thresholds."""
    if these[0]["judge_score"] is None:
        return {"judge_score": None, "synthetic_probability": None, "alarm_at": None}
    suspicion = np.array([row["judge_suspicion"] for row in these])
    of = Windows(np.zeros(len(these), np.int64), np.maximum(weights, 1))
    score = float(of.join(np.array([row["judge_score"] for row in these]), suspicion, how)[0])
    if figures is None:
        return {"judge_score": score, "synthetic_probability": None, "alarm_at": None}
    odds = float(log_odds(of.join(suspicion, suspicion, how))[0])
    alarms = [rates["target"] for rates in figures["thresholds"] if odds > rates["threshold"]]
    probability = float(Calibration(**figures["calibration"])(np.array(odds)))
    return {"judge_score": score, "synthetic_probability": probability, "alarm_at": min(alarms, default=None)}
