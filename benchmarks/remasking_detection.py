"""E1 of the re-masking benchmark: held-out text with masks filled by the generator, and who finds what is wrong in it.

Legend: B texts, T positions, N written tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.remasking_lab import Trained
from lib import metrics, randomness
from lib.diffusion.categorical import draw, probability_of
from lib.diffusion.masking import draw_mask, masked_counts
from lib.diffusion.top_k import lowest_k
from lib.sections.masking import RandomMasking, StickyMasking
from lib.training.objectives.base import chunks

BUDGET = 0.3  # of the written tokens: how many a round takes back when precision is measured
STICKY = StickyMasking(type="sticky", p1=0.02, p2=0.9)
MASKS = {"random": RandomMasking(type="random"), "sticky": STICKY}


@dataclass(frozen=True)
class Fill:
    """Held-out text with masks filled in one pass, and how suspicious each view finds every token."""

    wrong: np.ndarray  # (B, T)
    written: np.ndarray  # (B, T)
    seen: np.ndarray  # (B, T) written, and not hidden from the partial view
    views: dict[str, np.ndarray]  # (B, T) each


PARTIAL = ("critic_partial", "confidence_of_those")  # views that exist for the tokens in `seen` alone
NOT_CHANCES = ("random", "entropy", "critic_unknown")  # no probabilities, or not of the written tokens


@torch.no_grad()
def filled(trained: Trained, masks: str, ratio: float, passes: int, count: int) -> Fill:
    """`ratio` of the tokens of `count` texts that no model saw, masked (`MASKS`) and drawn at temperature 1 in `passes`.

    Each pass draws an equal share of them, with all that the passes before it drew in view, as in sampling.
    """
    clean = trained.held_out[:count]
    rows = np.arange(len(clean))
    eligible = np.ones(clean.shape, bool)
    counts = masked_counts(np.full(len(clean), ratio), eligible.sum(1))
    key = randomness.key(trained.seed, "benchmark fill")
    written = draw_mask(MASKS[masks], eligible, counts, key, rows)
    place = randomness.uniform(randomness.key(trained.seed, "benchmark place"), rows, clean.shape[1])
    ids = np.where(written, trained.mask_id, clean)
    confidence, entropy, left = np.ones(clean.shape), np.zeros(clean.shape), written.copy()
    share = np.zeros(len(clean))
    for number in range(passes):
        now = lowest_k(place, left, -(-left.sum(1) // (passes - number)))
        noise = randomness.uniform(
            randomness.key(trained.seed, "benchmark token", number), rows, clean.shape[1]
        )
        for part in chunks(len(clean), 64):
            at = np.flatnonzero(now[part])
            logits = logits_of(trained, torch.from_numpy(ids[part]), torch.from_numpy(at))
            barred = torch.tensor(trained.forbidden, device=logits.device)
            chance = torch.from_numpy(noise[part].reshape(-1)[at]).to(logits.device)
            tokens, sure = draw(logits, chance, barred)
            spread = torch.distributions.Categorical(logits=logits.index_fill(1, barred, -1e9)).entropy()
            for array, values in ((ids, tokens), (confidence, sure), (entropy, spread)):
                block = array[part]
                block.reshape(-1)[at] = values.cpu().numpy()
                array[part] = block
        left &= ~now
        share = now.mean(1)  # masked before the pass that completes the text
    views, hidden = _views(trained, ids, written, confidence, share)
    views |= {"entropy": entropy, "confidence_given": 1 - _given_confidence(trained, ids, written)}
    return Fill(ids != clean, written, written & ~hidden, views)


def _given_confidence(trained: Trained, ids: np.ndarray, written: np.ndarray) -> np.ndarray:
    """(B, T) probability of each written token with the given text alone in view; 1 for the given ones.

    As far as the generator's probabilities are the true ones, no view of its fills can be better: given that text, what was
    written tells nothing of the truth.
    """
    result, masked = np.ones(ids.shape), np.where(written, trained.mask_id, ids)
    for part in chunks(len(ids), 64):
        at = np.flatnonzero(written[part])
        logits = logits_of(trained, torch.from_numpy(masked[part]), torch.from_numpy(at))
        tokens = torch.from_numpy(ids[part].reshape(-1)[at]).to(logits.device)
        barred = torch.tensor(trained.forbidden, device=logits.device)
        block = result[part]
        block.reshape(-1)[at] = probability_of(tokens, logits, barred).double().cpu().numpy()
        result[part] = block
    return result


def logits_of(trained: Trained, inputs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    device = trained.runtime.device
    with trained.runtime.autocast():
        return trained.model(input_ids=inputs.to(device), logits_at=at.to(device)).logits.float()


def _views(trained: Trained, ids, written, confidence, share) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """((B, T) suspicion by each view but entropy, (B, T) what was hidden from the partial one: half)."""
    sampler, rows = trained.sampler(), np.arange(len(ids))
    noise = randomness.uniform(randomness.key(trained.seed, "benchmark hidden"), rows, ids.shape[1])
    hidden = lowest_k(noise, written, written.sum(1) // 2)
    half = np.where(hidden, trained.mask_id, ids)

    def read(texts: np.ndarray, given: np.ndarray | None = None) -> np.ndarray:
        return np.concatenate([
            sampler.raw_error(texts[p], None if given is None else given[p]) for p in chunks(len(ids), 64)
        ])  # fmt: skip

    raw, unknown, partly = read(ids, ~written), read(ids), read(half)
    fresh = np.concatenate([sampler.fresh_confidence(ids[p]) for p in chunks(len(ids), 64)])
    views = {
        "random": randomness.uniform(randomness.key(trained.seed, "benchmark chance"), rows, ids.shape[1]),
        "confidence": 1 - confidence,
        "fresh_confidence": 1 - fresh,
        "critic_raw": raw,
        "critic": trained.calibration(raw, "filled", share),
        "critic_unknown": unknown,
        "critic_blend": trained.calibration.blended(raw, confidence),
        "critic_partial": trained.calibration(partly, "partial", hidden.mean(1)),
        "confidence_of_those": 1 - confidence,
    }
    return views, hidden


def error_detection(trained: Trained, masks: str, ratio: float, passes: int, count: int) -> dict[str, Any]:
    """View -> AUROC, average precision, precision among the BUDGET most suspected, ECE; differences to confidence."""
    fill = filled(trained, masks, ratio, passes, count)
    result: dict[str, Any] = {"error_rate": float(fill.wrong[fill.written].mean()), "views": {}}
    for name, suspicion in fill.views.items():
        where = fill.seen if name in PARTIAL else fill.written
        base = fill.views["confidence"]
        score, wrong, group = suspicion[where], fill.wrong[where], np.nonzero(where)[0]
        top = _precision(suspicion, where, fill.wrong)
        result["views"][name] = {
            "auroc": metrics.auroc_estimate(score, wrong, group)._asdict(),
            "auroc_over_confidence": metrics.auroc_estimate(score, wrong, group, base[where])._asdict(),
            "average_precision": metrics.average_precision(score, wrong),
            "precision": metrics.ratio(top)._asdict(),
            "ece": None if name in NOT_CHANCES else metrics.calibration_error(score, wrong),
        }
    return result


def _precision(suspicion: np.ndarray, where: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(B,) share of errors among the most suspected BUDGET of each text."""
    count = np.maximum(np.rint(BUDGET * where.sum(1)).astype(np.int64), 1)
    order = np.argsort(np.argsort(np.where(where, -suspicion, np.inf), 1, kind="stable"), 1)
    return ((order < count[:, None]) & wrong & where).sum(1) / count
