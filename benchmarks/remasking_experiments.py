"""E2 to E6 of the re-masking benchmark: the measurements in one setting for one seed.

Every function takes trained models and one setting and returns plain numbers. An estimate is {"value", "low", "high"} with
a 95 % interval over samples. Policies in one setting are compared on the same texts, so differences are paired.

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

REPEATED = 8  # length of a repetition in characters
MIN_TEMPERATURES = 3  # of a curve

# Name in the table -> policy, its own settings of the sampler
Lines = dict[str, tuple[str, dict[str, Any]]]


def estimate(numerators: np.ndarray, denominators: np.ndarray | None = None) -> dict[str, float]:
    return metrics.ratio(numerators, denominators)._asdict()


# ------------------------------------------------------------------------------------- E2: infilling


def infilling(
    trained: Trained, ratio: float, nfe: int, lines: Lines, count: int, **changes: Any
) -> dict[str, Any]:
    """Line -> share of correct tokens in sticky spans of held-out text, and NLL minus that of the true text.

    The NLL is that of the whole text under both judges, in nats per generated token: a span must also fit the text after it.
    """
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
    """Runs at each NFE. Stops where a policy's samples are less diverse than real text at all temperatures.

    With more forward passes such a policy re-masks even more rare tokens.
    """
    ids, free = trained.blank(count)
    runs: list[dict[str, Any]] = []
    start = 1.0
    for nfe in sorted(budgets):

        def make(temperature: float, nfe: int = nfe) -> Samples:
            return trained.sample(policy, nfe, ids, free, temperature=temperature, **changes)

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
    """The same for a causal model, which needs one forward pass per token."""
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
    """(4-gram entropy of as many real texts, quality of the samples at the temperatures around that entropy).

    Starts at the temperature closest to `start`. It goes lower while samples are more diverse than real text, and higher
    while they are less diverse. Then it goes lower still, until the curve has MIN_TEMPERATURES points.
    """
    ladder = sorted(temperatures)
    goal = metrics.ngram_entropy(characters(trained.texts(trained.held_out[:count])), 4)
    found: dict[int, dict[str, Any]] = {}
    at: int | None = min(range(len(ladder)), key=lambda position: abs(ladder[position] - start))
    while at is not None:
        begin = time.perf_counter()
        made = make(ladder[at])
        seconds = time.perf_counter() - begin
        head = {"temperature": ladder[at], "passes": made.nfe, "seconds": seconds}
        found[at] = head | quality(trained, made.ids)
        at = next_temperature(
            {position: run["fourgram_entropy"] for position, run in found.items()}, goal, len(ladder)
        )
    return goal, [found[position] for position in sorted(found)]


def next_temperature(found: Mapping[int, float], goal: float, size: int) -> int | None:
    """Index of the temperature to try next, or None. `found`: entropy of the adjacent temperatures tried so far."""
    below, above = min(found) - 1, max(found) + 1
    if min(found.values()) > goal and below >= 0:
        return below
    if max(found.values()) < goal and above < size:
        return above
    if len(found) >= min(MIN_TEMPERATURES, size):
        return None
    return below if below >= 0 else above


def real_text(trained: Trained, count: int) -> dict[str, Any]:
    """The same for as many held-out texts."""
    return quality(trained, trained.held_out[:count]) | {"passes": 0}


def quality(trained: Trained, ids: np.ndarray) -> dict[str, Any]:
    """Likelihood, diversity, valid words, repetition, distance from real text, and copying."""
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
    """Share of correct sentences in samples of the language of sums, and how many of them differ."""
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
    """A variant of the critic: the generator's NELBO, detection of errors, and the accuracy of its policies.

    Errors are those of sticky spans filled in `nfe` forward passes.
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
    """Seconds per sample, the share of bare forward passes in them, and whether the batch size changes samples.

    Samples and bare passes take turns, so that other load affects both. The fastest of each counts.
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
    """Forward passes of the generator over texts, with logits at half of the positions."""
    for part in chunks(len(ids), 64):
        at = torch.arange(0, ids[part].size, 2)
        for _ in range(passes):
            logits_of(trained, torch.from_numpy(ids[part]), at)
