"""The experiments of the re-masking benchmark: what is measured in one setting for one seed. No file, no table.

Every function takes trained models and one setting and returns plain numbers; an estimate is {"value", "low", "high"},
a 95 % interval over samples. Policies in one setting are compared on the same texts, so their differences are paired.

Legend: B texts, T positions, N written tokens.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.languages import Sums
from benchmarks.remasking_lab import CRITIC, Trained
from benchmarks.text_quality import divergence, longest_copy, repeated
from lib import metrics, randomness
from lib.diffusion.autoregressive import sample_autoregressively
from lib.diffusion.categorical import draw, probability_of
from lib.diffusion.lowest import lowest
from lib.diffusion.masking import draw_mask, masked_counts
from lib.diffusion.sampler import Samples
from lib.report.quality import characters, valid_words
from lib.sections.masking import RandomMasking, StickyMasking
from lib.training.objectives.base import chunks

BUDGET = 0.3  # of the written tokens: how many a round takes back when precision is measured
STICKY = StickyMasking(type="sticky", p1=0.02, p2=0.9)
MASKS = {"random": RandomMasking(type="random"), "sticky": STICKY}
REPEATED = 8  # characters of a repetition
LEAST = 3  # temperatures of a curve

Lines = dict[
    str, tuple[str, dict[str, Any]]
]  # name in the table -> policy, settings of the sampler of its own


def estimate(numerators: np.ndarray, denominators: np.ndarray | None = None) -> dict[str, float]:
    return metrics.ratio(numerators, denominators)._asdict()


# ------------------------------------------------------------------------------- E1: error detection


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
    clean = trained.unseen[:count]
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
        now = lowest(place, left, -(-left.sum(1) // (passes - number)))
        noise = randomness.uniform(
            randomness.key(trained.seed, "benchmark token", number), rows, clean.shape[1]
        )
        for part in chunks(len(clean), 64):
            at = np.flatnonzero(now[part])
            logits = _logits(trained, torch.from_numpy(ids[part]), torch.from_numpy(at))
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
        logits = _logits(trained, torch.from_numpy(masked[part]), torch.from_numpy(at))
        tokens = torch.from_numpy(ids[part].reshape(-1)[at]).to(logits.device)
        barred = torch.tensor(trained.forbidden, device=logits.device)
        block = result[part]
        block.reshape(-1)[at] = probability_of(tokens, logits, barred).double().cpu().numpy()
        result[part] = block
    return result


def _logits(trained: Trained, inputs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    device = trained.runtime.device
    with trained.runtime.autocast():
        return trained.model(input_ids=inputs.to(device), logits_at=at.to(device)).logits.float()


def _views(trained: Trained, ids, written, confidence, share) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """((B, T) suspicion by each view but entropy, (B, T) what was hidden from the partial one: half)."""
    sampler, rows = trained.sampler(), np.arange(len(ids))
    noise = randomness.uniform(randomness.key(trained.seed, "benchmark hidden"), rows, ids.shape[1])
    hidden = lowest(noise, written, written.sum(1) // 2)
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
        "confidence_fresh": 1 - fresh,
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
            "precision": estimate(top),
            "ece": None if name in NOT_CHANCES else metrics.calibration_error(score, wrong),
        }
    return result


def _precision(suspicion: np.ndarray, where: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """(B,) share of errors among the most suspected BUDGET of each text."""
    count = np.maximum(np.rint(BUDGET * where.sum(1)).astype(np.int64), 1)
    order = np.argsort(np.argsort(np.where(where, -suspicion, np.inf), 1, kind="stable"), 1)
    return ((order < count[:, None]) & wrong & where).sum(1) / count


# ------------------------------------------------------------------------------------- E2: infilling


def infilling(
    trained: Trained, ratio: float, nfe: int, lines: Lines, count: int, **changes: Any
) -> dict[str, Any]:
    """Line -> share of right tokens in sticky spans of held-out text, and by how much the whole text is less likely
    than the true one under both judges, in nats per written token: a span must also fit what stands behind it."""
    clean = trained.unseen[:count]
    eligible = np.ones(clean.shape, bool)
    counts = masked_counts(np.full(len(clean), ratio), eligible.sum(1))
    key = randomness.key(trained.seed, "benchmark spans")
    free = draw_mask(STICKY, eligible, counts, key, np.arange(len(clean)))
    everywhere = np.ones_like(free)
    truth = {"reference": trained.reference_nll(clean, everywhere), "ngram": trained.ngram.nll(clean).sum(1)}
    hits, result = {}, {}
    against = next(iter(lines))
    for name, (policy, own) in lines.items():
        begin = time.perf_counter()
        made = trained.sample(policy, nfe, clean, free, truth=clean, **changes, **own)
        seconds = time.perf_counter() - begin
        hits[name] = ((made.ids == clean) & free).sum(1)
        result[name] = {
            "passes": made.nfe,
            "seconds": seconds,
            "accuracy": estimate(hits[name], counts),
            f"over_{against}": estimate(hits[name] - hits[against], counts),
            "reference_over_truth": estimate(
                trained.reference_nll(made.ids, everywhere) - truth["reference"], counts
            ),
            "ngram_over_truth": estimate(trained.ngram.nll(made.ids).sum(1) - truth["ngram"], counts),
        }
    return {"policies": result, "against": against}


# --------------------------------------------------------------------------------- E3: whole samples


def unconditional(
    trained: Trained, policy: str, nfe: int, count: int, temperatures: Sequence[float], **changes: Any
) -> dict[str, Any]:
    ids, free = trained.blank(count)
    return around_real_text(
        trained, count, temperatures, lambda heat: trained.sample(policy, nfe, ids, free, temperature=heat, **changes)
    )  # fmt: skip


def autoregressive(
    trained: Trained, model: nn.Module, count: int, temperatures: Sequence[float]
) -> dict[str, Any]:
    """The same of a causal model: a pass for every token."""
    ids, free = trained.blank(count)
    model = model.to(trained.runtime.device)
    return around_real_text(trained, count, temperatures, lambda heat: sample_autoregressively(
        model, ids, free, np.arange(count), trained.tokenizer.cls_token_id, trained.forbidden,
        trained.config.sampler.model_copy(update={"temperature": heat}), trained.runtime, trained.seed, trained.context,
    ))  # fmt: skip


def around_real_text(
    trained: Trained, count: int, temperatures: Sequence[float], make: Callable[[float], Samples]
) -> dict[str, Any]:
    """Samples at the temperatures around which they are as varied as real text, by 4-gram entropy.

    From the one nearest to 1 colder as long as they are more varied, hotter as long as they are less; then colder still,
    until there are `LEAST` points of the curve.
    """
    ladder = sorted(temperatures)
    goal = metrics.ngram_entropy(characters(trained.texts(trained.held_out[:count])), 4)
    found: dict[int, dict[str, Any]] = {}
    at: int | None = min(range(len(ladder)), key=lambda place: abs(ladder[place] - 1))
    while at is not None:
        begin = time.perf_counter()
        made = make(ladder[at])
        head = {
            "temperature": ladder[at],
            "passes": made.nfe,
            "seconds": time.perf_counter() - begin,
        }
        found[at] = head | quality(trained, made.ids)
        at = next_place({place: run["fourgram_entropy"] for place, run in found.items()}, goal, len(ladder))
    return {"temperatures": [found[place] for place in sorted(found)]}


def next_place(found: Mapping[int, float], goal: float, size: int) -> int | None:
    """Which of `size` temperatures is to be tried next: `found` holds a neighbouring few of them with what they gave."""
    below, above = min(found) - 1, max(found) + 1
    if min(found.values()) > goal and below >= 0:
        return below
    if max(found.values()) < goal and above < size:
        return above
    if len(found) >= min(LEAST, size):
        return None
    return below if below >= 0 else above


def real_text(trained: Trained, count: int) -> dict[str, Any]:
    """The same of as many held-out texts."""
    return quality(trained, trained.held_out[:count]) | {"passes": 0}


def quality(trained: Trained, ids: np.ndarray) -> dict[str, Any]:
    """Likelihood beside variety, words, repetition, distance from real text, and copying."""
    texts, all_of = trained.texts(ids), np.ones(ids.shape, bool)
    codes, length = characters(texts), np.array([len(t) for t in texts], float)
    words = valid_words(texts, trained.words)
    again = np.array([repeated(code, REPEATED) for code in codes])
    return {
        "reference_nll": estimate(trained.reference_nll(ids, all_of), length),
        "ngram_nll": estimate(trained.ngram.nll(ids).sum(1), length),
        "character_entropy": metrics.ngram_entropy(codes, 1),
        "fourgram_entropy": metrics.ngram_entropy(codes, 4),
        "valid_words": None if words is None else words._asdict(),
        "repetition": estimate(again),
        "divergence": divergence(ids, trained.held_out[-len(ids) :]),
        "longest_copy": longest_copy(ids, trained.train_ids),
    }


# ------------------------------------------------------------------------------------------ E4: sums


def sums(trained: Trained, policy: str, nfe: int, count: int, digits: int, **changes: Any) -> dict[str, Any]:
    """Share of right sentences among those that samples of the language of sums hold, and how many of them differ."""
    ids, free = trained.blank(count)
    made = trained.sample(policy, nfe, ids, free, **changes)
    texts, language = trained.texts(made.ids), Sums(digits)
    right, total = language.judge(texts)
    different = {sentence for text in texts for sentence in language.sentences(text)}
    return {
        "passes": made.nfe,
        "valid": estimate(right, total),
        "sentences": float(total.mean()),
        "different": len(different) / max(float(total.sum()), 1.0),
    }


# ------------------------------------------------------------------------------------- E5: ablations


def ablation(trained: Trained, ratio: float, nfe: int, lines: Lines, count: int) -> dict[str, Any]:
    """What a variant of the critic costs the generator, how well it finds errors, and what its policies gain.

    Errors are those of sticky spans filled in `nfe` passes.
    """
    after = trained.stats(CRITIC)
    detection = error_detection(trained, "sticky", ratio, nfe, count)["views"]
    return {
        "nelbo": after["generator_nelbo"],
        "auroc": detection["critic"]["auroc"],
        "auroc_partial": detection["critic_partial"]["auroc"],
        "ece": detection["critic"]["ece"],
        "ece_raw": detection["critic_raw"]["ece"],
    } | infilling(trained, ratio, nfe, lines, count)


# ------------------------------------------------------------------------------------------ E6: cost


def cost(trained: Trained, policy: str, nfe: int, count: int, repeats: int = 3) -> dict[str, Any]:
    """Seconds per sample, share of the bare forward passes in them, and whether the batch size matters."""
    ids, free = trained.blank(count)
    made = trained.sample(policy, nfe, ids, free, batch_size=64)
    seconds = _best(lambda: trained.sample(policy, nfe, ids, free, batch_size=64), repeats)
    bare = _best(lambda: _bare_passes(trained, ids, round(made.nfe)), repeats)
    few = min(count, 6)
    alone = trained.sample(policy, nfe, ids[:few], free[:few], batch_size=1)
    same = bool((alone.ids == made.ids[:few]).all())
    return {
        "passes": made.nfe,
        "seconds_per_sample": seconds / count,
        "bare_share": bare / seconds,
        "same_alone": same,
    }


@torch.no_grad()
def _bare_passes(trained: Trained, ids: np.ndarray, passes: int) -> None:
    """So many passes of the generator over texts of which half is masked, with logits there."""
    for part in chunks(len(ids), 64):
        at = torch.arange(0, ids[part].size, 2)
        for _ in range(passes):
            _logits(trained, torch.from_numpy(ids[part]), at)


def _best(action: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)
