"""The parts of stage 06's tables: one part per policy and budget, and a last one with the baselines and the best of N.

A stage that was interrupted continues with the policy at which it stopped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lib import schema
from lib.diffusion.policies import POLICIES
from lib.diffusion.samples import MaskedTexts
from lib.evaluation.infilling import Start
from lib.evaluation.sample_evaluator import SampleEvaluator
from lib.evaluation.sampling import SamplingResults, add_baselines, choose_best_of, sample_policy
from lib.stage.parts import MadeParts, Parts

BYTES_OF_A_TOKEN, BYTES_OF_A_REPORT = 16, 3_000_000
TABLES = {"samples": schema.SAMPLES, "trace": schema.TRACE}


@dataclass(frozen=True)
class SampleWork:
    """Makes the parts in this process, which has the models.

    Attributes:
        plan: (policy, budget of forward passes) of every part but the last.
    """

    evaluator: SampleEvaluator
    starts: list[Start]
    plan: list[tuple[str, int]]
    parts: Parts

    uses_device = True
    only_here = True

    def __len__(self) -> int:
        """Number of parts."""
        return len(self.plan) + 1

    @property
    def num_bytes(self) -> int:
        """What the tables and the report take on the disk, estimated from above."""
        tokens = len(self) * sum(start.ids.size for start in self.starts)
        return BYTES_OF_A_TOKEN * tokens + BYTES_OF_A_REPORT

    def open(self, threads: int | None):
        """Returns a function that makes the part of a number. Layers are compiled here, outside of the time of a policy."""
        if self.evaluator.config.sampler.compile == "on":
            some, (policy, nfe) = self.starts[0].first(2), self.plan[0]
            texts = MaskedTexts(some.ids, some.free, some.number, some.truth)
            self.evaluator.sampler.sample(texts, POLICIES[policy], nfe)
        return self._make

    def _make(self, number: int) -> None:
        results = SamplingResults()
        if number < len(self.plan):
            sample_policy(self.evaluator, self.starts, *self.plan[number], results)
        else:
            add_baselines(self.evaluator, self.starts, results)
            choose_best_of(self.evaluator, self.starts, results)
        with self.parts.writing(number) as part:
            part.write("samples", results.samples())
            part.write("trace", results.trace())
            part.environment = self.evaluator.runtime.of_parts() | self.evaluator.layers.of_parts()
            part.counters = {"policies": results.policies, "best_of": results.best_of}


def results_of(made: MadeParts) -> SamplingResults:
    """The results of all parts together."""
    results = SamplingResults()
    for number, counters in enumerate(made.counters):
        results.policies += _estimates(counters["policies"])
        results.best_of += _estimates(counters["best_of"])
        for name, rows in (("samples", results.sample_rows), ("trace", results.trace_rows)):
            for table in made.table(name, number).tables(TABLES[name]):
                rows += table.to_pylist()
    return results


def _estimates(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with NaN where an interval has no ends: JSON holds it as null."""
    return [{name: _estimate(value) for name, value in row.items()} for row in rows]


def _estimate(value: Any) -> Any:
    if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
        return {key: math.nan if number is None else number for key, number in value.items()}
    return value
