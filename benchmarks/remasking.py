"""
Does re-masking pay, and does a learned critic? All policies at equal NFE, on text and on a language with exact answers.

* E1: detection of wrong tokens in held-out fills: critic, stored and fresh confidence, entropy, chance, and the upper bound.
* E2: infilling of sticky spans of held-out text: correct tokens, likelihood, and the oracle as the upper bound.
* E3: whole samples: likelihood under two judges at equal 4-gram entropy, beside an autoregressive model; words, repetition,
  copying.
* E4: sums in brackets, which are decided exactly: share of correct sentences, and how many of them differ.
* E5: ablations: how the critic is trained and used, and what it costs the generator.
* E6: seconds per sample, and equality of samples at any batch size.

Policies that re-mask use the second half of their steps as corrector steps at a low temperature. E3 sweeps the temperature.
In E2 and E5, lines named "cold" use that low temperature without re-masking. E4 has no corrector steps, except in lines that
say so; its lines named "sharp" re-mask exactly the tokens with the highest error score.

Per seed: generator, reference model and critics, trained by the project's own stages, and an n-gram judge. Each (seed,
experiment, setting) is a line of OUT/results.jsonl with its provenance: code, date, command, library versions, machine. An
interrupted benchmark continues where it stopped. It writes tables to OUT/summary.md, and OUT/passes.svg and OUT/pareto.svg.

Full: 3 seeds, 4 layers x 128 with context 128. Steps: 2,000 for the generator, 800 for the reference model, 2,000 for the
critic, 240 for each critic of the ablations. Sums: 4 x 128 with context 64, 6,000 and 1,000 steps. 256 texts per setting (128
in E2, E3 and E5, 64 in E6). About seven and a half hours on two cores. --quick: 1 seed, 2 x 64 with context 64, a few
hundred steps, 24 texts, the main policies; under 5 minutes.

python -m benchmarks.remasking outputs/remasking
python -m benchmarks.remasking outputs/remasking --data /path/to/tinyshakespeare/input.txt --only E1,E2
python -m benchmarks.remasking outputs/remasking_quick --quick

Several processes with one thread each use the cores better than one process with all threads. They can share OUT when each
has its own seeds:

OMP_NUM_THREADS=1 python -m benchmarks.remasking OUT --seeds 0 & OMP_NUM_THREADS=1 python -m benchmarks.remasking OUT --seeds 1,2

More seeds narrow the intervals of whole samples. --contested measures only the lines whose differences are reported: about
80 minutes of one core per seed.

python -m benchmarks.remasking OUT --seeds 3,4 --contested
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import remasking_detection as detection
from benchmarks import remasking_experiments as experiments
from benchmarks.provenance import files, provenance
from benchmarks.remasking_lab import SUMS, TEXT, VARIANTS, Lab, Size
from benchmarks.remasking_numbers import AUTOREGRESSIVE, REAL
from benchmarks.remasking_summary import BASELINES, CHURNED, SECTIONS, commit_of, write_summary
from lib import code_version, durable
from lib.config import load_config
from lib.diffusion.policies import POLICIES
from lib.log import say
from lib.runs import plain

ALL = tuple(name for name in POLICIES if name != "oracle")
PLAIN = {"corrector_share": 0.0, "end_ratio": 0.05}  # no corrector steps
LEADING = (
    "ancestral",
    "random_remask",
    "confidence_remask",
    "remdm_conf",
    "critic",
    "critic_partial",
    "critic_origin",
)
ABLATED = ("ancestral", "critic", "critic_partial", "critic_origin")  # policies of E5
# A low temperature alone finds likelier tokens: these lines use it without re-masking
COLD = {"temperature": 0.3}
# Policies that run a second time so in E2 and E5, where no temperatures are swept
COLD_POLICIES = ("ancestral", "confidence_order")
# Policies run a second time so in E4: without the noise that is blended into the error score
SHARP = {"randomness_strength": 0.0}
BY_CHANCE = (
    "random_remask",
    "remdm_cap",
    "remdm_rescale",
)  # re-mask at random: no error score to sharpen
CONTESTED = (REAL, "critic_origin", *BASELINES)  # lines of E3
STOPPING = ("critic", "confidence_order")  # policies that also run with the schedule `threshold`


@dataclass(frozen=True)
class Plan:
    """The amounts of everything that is measured.

    Attributes:
        temperatures: of E3. Each policy uses those around the diversity of real text, at least three.
        plain_policies: run a second time in E3, without corrector steps.
        changes: settings of the sampler that E5 tries with the joint critic.
    """

    seeds: int
    text: Size
    sums: Size
    texts: int  # per setting of E1 and E4
    samples: int  # per setting of E3
    ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    fill_passes: tuple[int, ...] = (1, 16)  # of E1
    span_ratio: float = 0.5  # of E2 and E5
    span_nfe: tuple[int, ...] = (2, 4, 8, 16, 32)
    sample_nfe: tuple[int, ...] = (8, 16, 32, 64, 128)
    temperatures: tuple[float, ...] = (0.35, 0.5, 0.75, 1.0, 1.3, 1.7, 2.2)
    sum_nfe: tuple[int, ...] = (4, 8, 16, 32)
    sum_temperatures: tuple[float, ...] = (0.5, 1.0)
    thresholds: tuple[float, ...] = (0.1, 0.3)
    policies: tuple[str, ...] = ALL
    # Of E3; remdm_rescale is its line CHURNED
    sample_policies: tuple[str, ...] = tuple(name for name in ALL if name != "remdm_rescale")
    plain_policies: tuple[str, ...] = ("random_remask", "remdm_conf", "critic_origin")
    variants: tuple[str, ...] = tuple(VARIANTS)
    changes: tuple[tuple[tuple[str, Any], ...], ...] = (
        (("randomness_strength", 0.0),), (("randomness_strength", 0.6),), (("selection_temperature", 1.0),),
        (("calibrated", False),), (("corrector_share", 0.0),), (("corrector_temperature", 1.0),), (("remask_share", 1.0),),
    )  # fmt: skip
    cost_nfe: int = 32
    cost_texts: int = 64
    span_texts: int = 128  # of E2 and E5


PLANS = {
    "full": Plan(
        seeds=3, texts=256, samples=128,
        text=Size(4, 128, 128, (2000, 800, 2000, 240)),
        sums=Size(4, 128, 64, (6000, 20, 1000, 0), 64, sentences=100_000),
    ),
    "quick": Plan(
        seeds=1, texts=24, samples=24, ratios=(0.3, 0.7), fill_passes=(1, 8), span_nfe=(4, 16),
        sample_nfe=(8, 32), sum_nfe=(4, 16), thresholds=(0.2,),
        policies=LEADING, sample_policies=("ancestral", "random_remask", "critic", "critic_origin"), plain_policies=(),
        variants=("joint", "no critic"), changes=((("calibrated", False),),), cost_nfe=16, cost_texts=24, span_texts=24,
        text=Size(2, 64, 64, (300, 120, 120, 50), 24, evaluated=32),
        sums=Size(2, 64, 32, (1000, 10, 100, 0), 32, sentences=8000, digits=1, evaluated=32),
    ),
    "tiny": Plan(  # for the tests: everything runs, nothing is learned
        seeds=1, texts=4, samples=4, ratios=(0.5,), fill_passes=(2,), span_nfe=(3,),
        sample_nfe=(4,), temperatures=(0.7, 1.5), plain_policies=("random_remask",), sum_nfe=(3,), thresholds=(0.2,), policies=("ancestral", "critic"),
        sample_policies=("ancestral", "critic"), variants=("joint", "no critic"), changes=((("calibrated", False),),),
        cost_nfe=3, cost_texts=4, span_texts=4, text=Size(1, 32, 32, (4, 4, 4, 4), 8, evaluated=8),
        sums=Size(1, 32, 32, (4, 4, 4, 0), 8, sentences=2500, digits=1, evaluated=8),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One setting of one experiment: its result is one line."""

    experiment: str
    setting: dict[str, Any]
    run: Callable[[Lab, int], dict[str, Any]]

    @property
    def name(self) -> str:
        return name_of(self.experiment, self.setting)

    @property
    def contested(self) -> bool:
        return self.experiment == "E3" and self.setting["policy"] in CONTESTED


def name_of(experiment: str, setting: dict[str, Any]) -> str:
    return json.dumps([experiment, setting], sort_keys=True)


def tasks(plan: Plan) -> Iterator[Task]:
    """All settings, in the order of the experiments."""
    for ratio in plan.ratios:
        for masks, passes in product(detection.MASKS, plan.fill_passes):
            setting = {"masks": masks, "ratio": ratio, "passes": passes}
            yield Task("E1", setting, lambda lab, seed, m=masks, r=ratio, n=passes: detection.error_detection(
                lab.models(seed), m, r, n, plan.texts))  # fmt: skip
    for nfe in plan.span_nfe:
        setting = {"ratio": plan.span_ratio, "nfe": nfe}
        yield Task("E2", setting, lambda lab, seed, n=nfe: experiments.infilling(
            lab.models(seed), plan.span_ratio, n, _lines((*plan.policies, "oracle")), plan.span_texts))  # fmt: skip
    yield Task(
        "E3", {"policy": REAL}, lambda lab, seed: experiments.real_text(lab.models(seed), plan.samples)
    )
    lines: list[tuple[str, str, dict[str, Any]]] = [(policy, policy, {}) for policy in plan.sample_policies]
    lines += [(f"{policy}, plain", policy, PLAIN) for policy in plan.plain_policies]
    # ReMDM's loop that re-masks at random as many tokens as critic_origin: the rest of the difference is the critic's
    lines.append((CHURNED, "remdm_rescale", {"remdm_share": load_config().sampler.remask_share}))
    for name, policy, changes in lines:
        yield Task("E3", {"policy": name}, lambda lab, seed, p=policy, c=changes: experiments.unconditional(
            lab.models(seed), p, plan.sample_nfe, plan.samples, plan.temperatures, **c))  # fmt: skip
    yield Task("E3", {"policy": AUTOREGRESSIVE}, lambda lab, seed: experiments.autoregressive(
        lab.models(seed), lab.autoregressive(seed), plan.samples, plan.temperatures))  # fmt: skip
    yield from _sum_tasks(plan)
    yield from _ablation_tasks(plan)
    for policy in plan.policies:
        setting = {"policy": policy, "nfe": plan.cost_nfe}
        yield Task("E6", setting, lambda lab, seed, p=policy: experiments.cost(
            lab.models(seed), p, plan.cost_nfe, plan.cost_texts))  # fmt: skip


def _lines(policies: tuple[str, ...]) -> experiments.Lines:
    """The policies, and those that are also tried at a low temperature."""
    cold = {f"{policy}, cold": (policy, COLD) for policy in COLD_POLICIES if policy in policies}
    return {policy: (policy, {}) for policy in policies} | cold


def _sum_tasks(plan: Plan) -> Iterator[Task]:
    def task(setting: dict[str, Any], policy: str, nfe: int, **changes: Any) -> Task:
        return Task("E4", setting, lambda lab, seed: experiments.sums(
            lab.models(seed, SUMS), policy, nfe, plan.texts, plan.sums.digits, **changes))  # fmt: skip

    lines = {
        (policy, temperature): (policy, PLAIN)
        for policy in plan.policies
        for temperature in plan.sum_temperatures
    }
    back = [policy for policy in plan.policies if POLICIES[policy].remasks]
    lines |= {(f"{policy}, corrector steps", 1.0): (policy, {}) for policy in back}
    unsure = [policy for policy in back if policy not in BY_CHANCE]
    lines |= {
        (f"{p}, sharp", temperature): (p, PLAIN | SHARP)
        for p in unsure
        for temperature in plan.sum_temperatures
    }
    for nfe in plan.sum_nfe:
        for (name, temperature), (policy, changes) in lines.items():
            setting = {"policy": name, "nfe": nfe, "temperature": temperature}
            yield task(setting, policy, nfe, temperature=temperature, **changes)
    for policy in STOPPING:
        for threshold in plan.thresholds:
            nfe = max(plan.sum_nfe)
            setting = {"policy": policy, "nfe": nfe, "temperature": 1.0, "threshold": threshold}
            yield task(setting, policy, nfe, schedule="threshold", threshold=threshold, **PLAIN)


def _ablation_tasks(plan: Plan) -> Iterator[Task]:
    how = (plan.span_ratio, plan.cost_nfe // 2, _lines(ABLATED), plan.span_texts)
    for variant in plan.variants:
        yield Task("E5", {"variant": variant}, lambda lab, seed, v=variant: experiments.ablation(
            lab.models(seed, TEXT, v), *how))  # fmt: skip
    for changes in map(dict, plan.changes):
        setting = {"variant": "joint", "changes": changes}
        yield Task("E5", setting, lambda lab, seed, c=changes: experiments.infilling(
            lab.models(seed, TEXT, "joint"), *how, **c))  # fmt: skip


class Results:
    """The lines of OUT/results.jsonl. A line that a kill cut off is skipped."""

    def __init__(self, path: Path):
        self.path, self.records = path, []
        content = path.read_bytes() if path.exists() else b""
        self._begin = b"" if content.endswith(b"\n") or not content else b"\n"  # ends a line that was cut off
        for line in content.splitlines():
            try:
                self.records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        self.done = {(r["seed"], name_of(r["experiment"], r["setting"])) for r in self.records}

    def add(self, task: Task, seed: int, result: dict[str, Any], seconds: float) -> None:
        head = {
            "seed": seed,
            "experiment": task.experiment,
            "setting": task.setting,
            "seconds": round(seconds, 2),
            "provenance": provenance(),
        }
        record = plain(head | {"result": result})
        line = self._begin + json.dumps(record, allow_nan=False).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line)  # in one call: another process may append to the same file
            os.fsync(file.fileno())
        self._begin = b""
        self.records.append(record)
        self.done.add((seed, task.name))

    def say_other_code(self) -> None:
        """Log how many lines come from other code. They stay, each with its own provenance."""
        now = code_version.digest(files())
        other = [r for r in self.records if r.get("provenance", {}).get("code") != now]
        if other:
            commits = Counter(commit_of(r) for r in other)
            said = ", ".join(f"{count:,} of {commit}" for commit, count in commits.items())
            say(
                f"{self.path} holds {len(other):,} lines of other code ({said}); another folder keeps them apart"
            )


def run(
    out: Path, plan_name: str, data: str = "builtin", seeds: tuple[int, ...] = (), only: tuple[str, ...] = (),
    contested: bool = False,
) -> Results:  # fmt: skip
    """Measure every setting that has no line yet, seed by seed, then write the tables of all lines. Returns all results.

    contested: only the lines whose differences are reported.
    """
    plan = PLANS[plan_name]
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other_settings(out / "settings.json", settings_of(plan, data))
    lab = Lab(out, data, {TEXT: plan.text, SUMS: plan.sums})
    results = Results(out / "results.jsonl")
    results.say_other_code()
    chosen = [
        task
        for task in tasks(plan)
        if (not only or task.experiment in only) and (task.contested or not contested)
    ]
    for seed in seeds or range(plan.seeds):
        left = [task for task in chosen if (seed, task.name) not in results.done]
        for number, task in enumerate(left, start=1):
            begin = time.perf_counter()
            result = task.run(lab, seed)
            seconds = time.perf_counter() - begin
            results.add(task, seed, result, seconds)
            say(
                f"seed {seed}, {number}/{len(left)}: {task.experiment} {json.dumps(task.setting)}, {seconds:.1f} s"
            )
    write_tables(out, plan)
    return results


def write_tables(out: Path, plan: Plan) -> None:
    """Tables and pictures of all lines that OUT/results.jsonl holds, in the plan's order."""
    planned = {task.name: number for number, task in enumerate(tasks(plan))}
    records = Results(out / "results.jsonl").records  # also those of other processes
    records.sort(key=lambda r: planned.get(name_of(r["experiment"], r["setting"]), len(planned)))
    write_summary(out, records)
    say(f"{out / 'summary.md'}")


def settings_of(plan: Plan, data: str) -> dict[str, Any]:
    """What all lines of a results.jsonl have in common. The lines of E3 are not part of it."""
    config = load_config()
    shipped = {"sampler": config.sampler.model_dump(), "critic": config.critic.model_dump(), "plain": PLAIN}
    settings = asdict(plan) | shipped | {"seeds": None, "data": data, "critics": VARIANTS}
    return plain({k: v for k, v in settings.items() if k not in ("sample_policies", "plain_policies")})


def _refuse_other_settings(path: Path, settings: dict) -> None:
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    if names := ", ".join(k for k in settings if settings[k] != stored.get(k)):
        raise SystemExit(f"{path.parent} holds results of other settings ({names}); give another folder")
    durable.write_json(path, settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for models, results and tables")
    parser.add_argument("--quick", action="store_true", help="small: under five minutes on two cores")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", default="builtin", help="a text file; builtin: Python's language reference")
    parser.add_argument("--seeds", default="", help="such as 0,1,2, which is the default; quick: 0")
    parser.add_argument("--only", default="", help="experiments, such as E1,E2")
    parser.add_argument(
        "--contested", action="store_true", help=f"only whole samples of {'; '.join(CONTESTED)}"
    )
    parser.add_argument(
        "--tables", action="store_true", help="train nothing: write tables and pictures of the stored lines"
    )
    options = parser.parse_args()
    only = tuple(name for name in options.only.split(",") if name)
    seeds = [seed for seed in options.seeds.split(",") if seed]
    if set(only) - set(SECTIONS) or not all(seed.isdecimal() for seed in seeds):
        parser.error(f"--only takes {', '.join(SECTIONS)}, --seeds whole numbers")
    data = options.data
    plan_name = "quick" if options.quick else "tiny" if options.tiny else "full"
    if options.tables:
        if not (options.out / "results.jsonl").exists():
            parser.error(f"--tables: {options.out / 'results.jsonl'} is not there")
        return write_tables(options.out, PLANS[plan_name])
    if not data.startswith("builtin"):
        if not Path(data).exists():
            parser.error(f"--data {data} is not there")
        data = str(Path(data).resolve())
    run(options.out, plan_name, data, tuple(map(int, seeds)), only, options.contested)


if __name__ == "__main__":
    main()
