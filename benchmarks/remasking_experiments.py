"""E2 to E6 of the re-masking benchmark: what is measured in one setting for one seed. No file, no table.

Every function takes trained models and one setting and returns plain numbers; an estimate is {"value", "low", "high"},
a 95 % interval over samples. Policies in one setting are compared on the same texts, so their differences are paired.

Legend: B texts, T positions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.languages import Sums
from benchmarks.remasking_detection import STICKY, error_detection, logits_of
from benchmarks.remasking_lab import CRITIC, Trained
from benchmarks.text_quality import divergence, longest_copy, repeated
from lib import metrics, randomness
from lib.diffusion.autoregressive import AutoregressiveSampler
from lib.diffusion.masking import draw_mask, masked_counts
from lib.diffusion.samples import MaskedTexts, Samples
from lib.evaluation.quality import characters, valid_words
from lib.training.objectives.base import chunks

REPEATED = 8  # characters of a repetition
LEAST = 3  # temperatures of a curve

# Name in the table -> policy, settings of the sampler of its own
Lines = dict[str, tuple[str, dict[str, Any]]]


def estimate(numerators: np.ndarray, denominators: np.ndarray | None = None) -> dict[str, float]:
    return metrics.ratio(numerators, denominators)._asdict()


# ------------------------------------------------------------------------------------- E2: infilling


def infilling(
    trained: Trained, ratio: float, nfe: int, lines: Lines, count: int, **changes: Any
) -> dict[str, Any]:
    """Line -> share of right tokens in sticky spans of held-out text, and by how much the whole text is less likely
    than the true one under both judges, in nats per written token: a span must also fit what stands behind it."""
    clean = trained.held_out[:count]
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
    trained: Trained, policy: str, budgets: Sequence[int], count: int, temperatures: Sequence[float],
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs at each budget of passes; none at larger budgets once all temperatures leave a policy's samples less varied
    than real text: with more passes it takes back more of what is rare."""
    ids, free = trained.blank(count)
    runs: list[dict[str, Any]] = []
    start = 1.0
    for nfe in sorted(budgets):

        def make(heat: float, nfe: int = nfe) -> Samples:
            return trained.sample(policy, nfe, ids, free, temperature=heat, **changes)

        goal, found = around_real_text(trained, count, temperatures, start, make)
        runs += [{"nfe": nfe} | run for run in found]
        nearest = min(found, key=lambda run: abs(run["fourgram_entropy"] - goal))
        start = nearest["temperature"]
        if max(run["fourgram_entropy"] for run in found) < goal:
            break
    return {"runs": runs}


def autoregressive(
    trained: Trained, model: nn.Module, count: int, temperatures: Sequence[float]
) -> dict[str, Any]:
    """The same of a causal model, whose budget is a pass for every token."""
    ids, free = trained.blank(count)
    model = model.to(trained.runtime.device)
    texts = MaskedTexts(ids, free, np.arange(count))

    def sample(temperature: float) -> Samples:
        settings = trained.config.sampler.model_copy(update={"temperature": temperature})
        return AutoregressiveSampler(
            model, trained.tokenizer.cls_token_id, trained.forbidden, trained.runtime, settings, trained.seed, trained.context
        ).sample(texts)  # fmt: skip

    _, found = around_real_text(trained, count, temperatures, 1.0, sample)
    return {"runs": [{"nfe": ids.shape[1]} | run for run in found]}


def around_real_text(
    trained: Trained, count: int, temperatures: Sequence[float], start: float, make: Callable[[float], Samples]
) -> tuple[float, list[dict[str, Any]]]:  # fmt: skip
    """(4-gram entropy of as many real texts, what samples are like at the temperatures around which they have it).

    From the one nearest to `start` colder as long as they are more varied, hotter as long as they are less; then colder
    still, until there are `LEAST` points of the curve.
    """
    ladder = sorted(temperatures)
    goal = metrics.ngram_entropy(characters(trained.texts(trained.held_out[:count])), 4)
    found: dict[int, dict[str, Any]] = {}
    at: int | None = min(range(len(ladder)), key=lambda place: abs(ladder[place] - start))
    while at is not None:
        begin = time.perf_counter()
        made = make(ladder[at])
        seconds = time.perf_counter() - begin
        head = {"temperature": ladder[at], "passes": made.nfe, "seconds": seconds}
        found[at] = head | quality(trained, made.ids)
        at = next_place({place: run["fourgram_entropy"] for place, run in found.items()}, goal, len(ladder))
    return goal, [found[place] for place in sorted(found)]


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
    """Seconds per sample, share of the bare forward passes in them, and whether the batch size matters.

    Samples and bare passes take turns, so that a machine that slows down slows both; of each the fastest counts.
    """
    ids, free = trained.blank(count)
    sampling, bare = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        made = trained.sample(policy, nfe, ids, free, batch_size=64)
        between = time.perf_counter()
        _bare_passes(trained, ids, round(made.nfe))
        sampling.append(between - begin)
        bare.append(time.perf_counter() - between)
    few = min(count, 6)
    alone = trained.sample(policy, nfe, ids[:few], free[:few], batch_size=1)
    return {
        "passes": made.nfe,
        "seconds_per_sample": min(sampling) / count,
        "bare_share": min(bare) / min(sampling),
        "same_alone": bool((alone.ids == made.ids[:few]).all()),
    }


@torch.no_grad()
def _bare_passes(trained: Trained, ids: np.ndarray, passes: int) -> None:
    """So many passes of the generator over texts of which half is masked, with logits there."""
    for part in chunks(len(ids), 64):
        at = torch.arange(0, ids[part].size, 2)
        for _ in range(passes):
            logits_of(trained, torch.from_numpy(ids[part]), at)
