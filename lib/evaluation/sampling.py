"""Sample with every policy at every budget of forward passes, and keep rows for the tables of stage 06."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lib import schema
from lib.diffusion.autoregressive import AutoregressiveSampler
from lib.diffusion.policies import POLICIES
from lib.diffusion.samples import MaskedTexts, Samples
from lib.evaluation.best_of import best_of
from lib.evaluation.infilling import UNKNOWN, Start
from lib.evaluation.measurements import Measurements
from lib.evaluation.quality import SamplingCost, describe, from_first_gap
from lib.evaluation.sample_evaluator import SampleEvaluator
from lib.log import say
from lib.tokenization import forbidden_ids

TRACED_SAMPLES = 2  # per policy and budget


@dataclass
class SamplingResults:
    """The results of stage 06.

    Attributes:
        policies: one row per policy and budget, then the baselines; see `lib.evaluation.quality.describe`.
        best_of: one row per scorer that chose among N samples; see `lib.evaluation.best_of`.
        sample_rows, trace_rows: rows of schema.SAMPLES and schema.TRACE.
    """

    policies: list[dict] = field(default_factory=list)
    best_of: list[dict] = field(default_factory=list)
    sample_rows: list[dict] = field(default_factory=list)
    trace_rows: list[dict] = field(default_factory=list)

    def samples(self) -> pa.Table:
        return pa.Table.from_pylist(self.sample_rows, schema.SAMPLES.arrow)

    def trace(self) -> pa.Table:
        return pa.Table.from_pylist(self.trace_rows, schema.TRACE.arrow)

    def add_samples(
        self, policy: str, nfe: int, start: Start, ids: np.ndarray, measured: Measurements
    ) -> None:
        """Add a row per sample. `ids`: (B, T)."""
        free, num_counted = start.free, from_first_gap(start.free).sum(1)
        for i, row in enumerate(ids):
            nll, score = measured.nll, measured.judge_scores
            self.sample_rows.append(
                {
                    "policy": policy,
                    "nfe": nfe,
                    "sample_id": int(start.number[i]),
                    "infill_id": None if start.names is None else start.names[i],
                    "text": measured.texts[i],
                    "token_ids": row.tolist(),
                    "given": (~free[i]).tolist(),
                    "reference_nll": None if nll is None else float(nll[i] / max(num_counted[i], 1)),
                    "critic_error": float(measured.errors[i][free[i]].mean()),
                    "token_error": measured.errors[i].tolist(),
                    "judge_score": None if score is None else float(score[i]),
                }
            )

    def add_trace(self, policy: str, nfe: int, sample_ids: np.ndarray, samples: Samples) -> None:
        """Add a row per sampling step and sample."""
        for iteration, step in enumerate(samples.rounds):
            for i, sample_id in enumerate(sample_ids):
                self.trace_rows.append(
                    {
                        "policy": policy,
                        "nfe": nfe,
                        "sample_id": int(sample_id),
                        "iteration": iteration,
                        "token_ids": step.ids[i].tolist(),
                        "events": step.events[i].tolist(),
                    }
                )


def sample_policy(
    evaluator: SampleEvaluator, starts: list[Start], policy: str, nfe: int, results: SamplingResults
) -> None:
    """Sample from all starts by one policy at one budget, measure the samples, and trace a few of them."""
    begin = time.perf_counter()
    made = [
        evaluator.sampler.sample(MaskedTexts(s.ids, s.free, s.number, s.truth), POLICIES[policy], nfe)
        for s in starts
    ]
    seconds = time.perf_counter() - begin
    passes = float(np.concatenate([m.passes for m in made]).mean())
    cost = SamplingCost(policy, nfe, passes, seconds)
    row, parts = _measure(evaluator, cost, starts, [m.ids for m in made])
    results.policies.append(row)
    for start, samples, measured in zip(starts, made, parts, strict=True):
        results.add_samples(policy, nfe, start, samples.ids, measured)
    some = starts[0].first(TRACED_SAMPLES)
    traced = evaluator.sampler.sample(
        MaskedTexts(some.ids, some.free, some.number, some.truth), POLICIES[policy], nfe, trace=True
    )
    results.add_trace(policy, nfe, some.number, traced)


def add_baselines(evaluator: SampleEvaluator, starts: list[Start], results: SamplingResults) -> None:
    """Add samples of the causal model, and real text.

    Real text is held-out text of the same length, or the targets of the texts that were filled.
    """
    if evaluator.autoregressive is not None:
        begin = time.perf_counter()
        made = [_sample_autoregressively(evaluator, s) for s in starts]
        seconds = time.perf_counter() - begin
        passes = float(np.concatenate([m.passes for m in made]).mean())
        cost = SamplingCost("autoregressive", round(passes), passes, seconds)
        results.policies.append(_measure(evaluator, cost, starts, [m.ids for m in made])[0])
    real = _real_starts(evaluator, starts)
    if real:
        cost = SamplingCost("real text", 0, 0, 0.0)
        results.policies.append(_measure(evaluator, cost, real, [s.ids for s in real])[0])


def choose_best_of(evaluator: SampleEvaluator, starts: list[Start], results: SamplingResults) -> None:
    """Sample `sampler.best_of` times from each start and add what each scorer chooses; nothing for one sample."""
    settings = evaluator.config.sampler
    if settings.best_of == 1:
        return
    policy, nfe, n = settings.best_of_policy, max(settings.nfe), settings.best_of
    results.best_of, texts = best_of(evaluator, starts, policy, nfe, n)
    for start, chosen in zip(starts, texts, strict=True):
        for scorer, ids in chosen.items():
            name = f"{policy}, best of {n} by {scorer}"
            results.add_samples(name, nfe, start, ids, Measurements.of(ids, start, evaluator))


def _measure(
    evaluator: SampleEvaluator, cost: SamplingCost, starts: list[Start], ids: list[np.ndarray]
) -> tuple[dict, list[Measurements]]:
    """(row of `SamplingResults.policies`, measurements of each start's samples)."""
    parts = [Measurements.of(each, start, evaluator) for each, start in zip(ids, starts, strict=True)]
    together = Measurements.concatenated(parts)
    row = describe(cost, together.generated, evaluator.words, together.nll)
    return row | together.means(), parts


def _sample_autoregressively(evaluator: SampleEvaluator, start: Start) -> Samples:
    special = forbidden_ids(evaluator.tokenizer)
    model: Any = evaluator.autoregressive
    sampler = AutoregressiveSampler(
        model, evaluator.tokenizer.cls_token_id, special, evaluator.runtime, evaluator.config.sampler,
        evaluator.config.seed, model.config.max_position_embeddings - 1,
    )  # fmt: skip
    return sampler.sample(MaskedTexts(start.ids, start.free, start.number))


def _real_starts(evaluator: SampleEvaluator, starts: list[Start]) -> list[Start]:
    """Real text in place of the samples; empty if there is none for all of them."""
    if starts[0].names is not None:
        known = [s for s in starts if s.truth is not None and (s.truth != UNKNOWN).all()]
        complete = len(known) == len(starts)
        if not complete and any(s.truth is not None for s in starts):
            say("real text is not measured: some rows of sampler.infill_file have no target")
        return [replace(s, ids=s.truth) for s in known if s.truth is not None] if complete else []
    # As many texts as samples, since the n-gram entropy grows with their number
    real = evaluator.real_text(len(starts[0].ids))[:, : starts[0].ids.shape[1]]
    # Measured from the same position on as the samples
    return [Start(real, starts[0].free[: len(real)], np.arange(len(real)))] if len(real) else []
