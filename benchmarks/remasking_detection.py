"""E1 of the re-masking benchmark: the generator fills masks of held-out text; which score finds the wrong tokens?

Legend: B texts, T positions, N generated tokens.
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

BUDGET = 0.3  # share of the generated tokens that a step re-masks, for the precision
STICKY = StickyMasking(type="sticky", p1=0.02, p2=0.9)
MASKS = {"random": RandomMasking(type="random"), "sticky": STICKY}


@dataclass(frozen=True)
class Fill:
    """Held-out text with filled masks, and the error score of every token by each view."""

    wrong: np.ndarray  # (B, T)
    written: np.ndarray  # (B, T)
    seen: np.ndarray  # (B, T) generated, and visible to the partial view
    views: dict[str, np.ndarray]  # (B, T) each


PARTIAL = ("critic_partial", "confidence_of_those")  # views that exist only for the tokens in `seen`
NOT_CHANCES = ("random", "entropy", "critic_unknown")  # not probabilities, or not of the generated tokens


@torch.no_grad()
def filled(trained: Trained, masks: str, ratio: float, passes: int, count: int) -> Fill:
    """Mask a share of the tokens of held-out texts and fill them at temperature 1 in a number of forward passes.

    Each pass fills an equal share and sees what earlier passes filled, as in sampling.

    Args:
        masks: a key of MASKS; ratio: share of masked tokens; count: number of texts.
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
        share = now.mean(1)  # share that is masked before the last pass
    views, hidden = _views(trained, ids, written, confidence, share)
    views |= {"entropy": entropy, "confidence_given": 1 - _given_confidence(trained, ids, written)}
    return Fill(ids != clean, written, written & ~hidden, views)


def _given_confidence(trained: Trained, ids: np.ndarray, written: np.ndarray) -> np.ndarray:
    """(B, T) probability of each generated token given the unmasked text alone; 1 for given tokens.

    If the generator's probabilities are correct, this is the upper bound for every view of its fills: given that text, the
    other fills carry no information about the original.
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
    """(N, V) logits at the flat positions `at` of (B, T) inputs."""
    device = trained.runtime.device
    with trained.runtime.autocast():
        return trained.model(input_ids=inputs.to(device), logits_at=at.to(device)).logits.float()


def _views(trained: Trained, ids, written, confidence, share) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """((B, T) error scores of each view except entropy, (B, T) the half that is hidden from the partial view)."""
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
    """View -> AUROC, average precision, precision among the BUDGET highest scores, ECE; differences to confidence."""
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
    """(B,) share of errors among the BUDGET highest scores of each text."""
    count = np.maximum(np.rint(BUDGET * where.sum(1)).astype(np.int64), 1)
    order = np.argsort(np.argsort(np.where(where, -suspicion, np.inf), 1, kind="stable"), 1)
    return ((order < count[:, None]) & wrong & where).sum(1) / count
