"""A critic on a frozen masked LM of another project: detection of wrong tokens, samples, cost.

The masked LM is one that Hugging Face's own code trained on novels (benchmarks/english_mlm.py), or a folder. Stage 04 tunes it
as a masked-diffusion model, once per seed. Stage 05 then trains each kind of critic on it, with and without look-back injection.
A seed is that of the splits, of all trainings after the masked LM's own, of the held-out texts and of the samples.

    detection   AUROC of wrong tokens in fills of held-out novels, after 1 and 16 forward passes. Sticky masks cover 60 % of the
                tokens. The baseline is the probability of each token when it was sampled
    samples     NLL under the run's reference model at the 4-gram entropy of real text, at equal NFE. All policies with the first
                critic. Two policies with each other critic, beside `ancestral` if its generator is its own
    infilling   share of correct tokens in the same sticky gaps, by the same policies
    cost        of the critic, and of the interface, in forward passes of the masked LM

Everything is in OUT_DIR. What is trained or measured there is not done again, so an interrupted benchmark continues, and
--seeds, --critics and --policies measure a part. Processes with seeds of their own share the work. --samples makes more samples
than 48, which narrows their intervals.

python -m benchmarks.pretrained_critic OUT_DIR
python -m benchmarks.pretrained_critic OUT_DIR --critics head --policies ancestral critic_origin --samples 96
python -m benchmarks.pretrained_critic OUT_DIR --quick
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from benchmarks import result_files
from benchmarks.english_mlm import FULL, QUICK, Training, make, novels
from benchmarks.remasking_detection import error_detection
from benchmarks.remasking_experiments import infilling, unconditional
from benchmarks.remasking_lab import Trained
from benchmarks.remasking_numbers import at_entropy, over_seeds
from lib import durable, metrics
from lib.config import Config, load_config
from lib.evaluation.quality import characters
from lib.models.pretrained import open_pretrained
from lib.runs import RunArgs
from lib.runtime import Runtime

BASE = ("00_check_data", "01_prepare_dataset", "04_train")
CRITIC = "05_train_critic"
LORA = {"rank": 16, "alpha": 32.0}
KINDS: dict[str, dict[str, Any]] = {
    "head": {"coupling": "decoupled", "num_layers": 0},
    "blocks": {"coupling": "decoupled", "num_layers": 2},
    "lora": {"coupling": "decoupled", "num_layers": 0, "lora": LORA},
    "joint": {"coupling": "joint", "num_layers": 0},
}
LOOK_BACK = {"": 0.0, "+look_back": 0.25}
WITHOUT_CRITIC = ("ancestral", "confidence_order", "random_remask", "confidence_remask", "remdm_conf")
WITH_CRITIC = ("critic", "critic_blend", "critic_partial", "critic_origin")
POLICIES = WITHOUT_CRITIC + WITH_CRITIC
SHORT = ("critic", "critic_origin")  # policies for critics that share their generator with the first one
AGAINST = "ancestral"
MASKED_SHARE = 0.6
FORWARD_PASSES = (1, 16)


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    lm: Training
    characters: int  # of the run's text: the end of the novels, which the masked LM has not seen
    context: int
    steps: tuple[int, int, int]  # of the generator, the reference model and each critic
    texts: int  # held-out windows for detection
    samples: int
    nfe: tuple[int, ...]
    temperatures: tuple[float, ...]
    seeds: tuple[int, ...]
    critics: tuple[str, ...]  # kinds, some of them with look-back injection


SIZES = {
    False: Size(FULL, 2_000_000, 62, (400, 800, 1000), 256, 48, (16, 32), tuple(t / 10 for t in range(4, 21)),
                (1, 2, 3), tuple(k + suffix for suffix in LOOK_BACK for k in KINDS)),
    True: Size(QUICK, 400_000, 62, (150, 150, 150), 64, 24, (16,), (0.6, 0.8, 1.0), (1,), ("head", "head+look_back", "lora")),
}  # fmt: skip


@dataclass
class Runs:
    """The runs of a benchmark: for each seed a base, and for each critic a run beside it with a stage 05 of its own."""

    out: Path
    model: Path
    size: Size
    only: tuple[str, ...] = ()  # the policies that are measured; empty: those of `policies_of`

    def text(self) -> Path:
        """The end of the novels, which the masked LM has not learned from."""
        file = self.out / "novels.txt"
        if not file.exists():
            durable.write_text(file, novels()[-self.size.characters :])
        return file

    def config(self, seed: int, name: str, critic: dict[str, Any]) -> Config:
        size = self.size
        generator, reference, of_critic = size.steps
        training = {"batch_size": 16, "evaluate_every": max(20, generator // 6), "checkpoint_every": 10_000}
        schedule = {"steps": of_critic, "evaluate_every": of_critic // 2, "evaluation_examples": 64}
        content = {
            "seed": seed,
            "pretrained": {"model": str(self.model), "adapter": "none"},
            "data": {"path": str(self.text()), "passage_characters": 1024, "block_characters": 4096,
                     "fractions": {"train": 0.71, "held_out": 0.03, "reference": 0.26}, "selection_fraction": 0.03},
            "tokenizer": {"unknown": "unk"},
            "architecture": {"context": size.context},
            "training": training | {"learning_rate": 0.0003},
            "models": {"generator": {"start": "scratch", "training": {"steps": generator, "learning_rate": 0.0003}},
                       "reference_lm": {"training": {"steps": reference}},
                       "ar_baseline": None, "inspector": None, "judge": None, "ranker": None},
            "critic": {"lora": None, "training": schedule | {"learning_rate": 0.001}} | critic,
        }  # fmt: skip
        if critic.get("coupling") == "joint":
            # A step takes twice as long, and the generator has learned already
            half = {"steps": of_critic // 2, "evaluate_every": of_critic // 4}
            content["critic"]["training"] |= half | {"learning_rate": 0.0003}
        file = self.out / "configs" / f"{name}_{seed}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(file, yaml.safe_dump(json.loads(json.dumps(content))))
        return load_config(["configs/pretrained.yaml", file])

    def trained(self, seed: int, name: str) -> Trained:
        """A critic on the tuned masked LM. What does not exist yet is trained."""
        base, folder = (self.out / f"seed_{seed}" / kind for kind in ("base", name.replace("+", "_")))
        for stage in BASE:
            importlib.import_module(stage).main(self.config(seed, "base", {}), RunArgs(run_dir=base))
        folder.mkdir(parents=True, exist_ok=True)
        for stage in BASE:
            if not (folder / stage).exists():
                (folder / stage).symlink_to(Path("..", "base", stage))
        kind, _, look_back = name.partition("+")
        critic = KINDS[kind] | {"look_back": LOOK_BACK["+" + look_back if look_back else ""]}
        config = self.config(seed, name, critic)
        importlib.import_module(CRITIC).main(config, RunArgs(run_dir=folder))
        return Trained(config, folder, Runtime.detect(config), seed)

    def measured(self, seed: int, name: str) -> dict[str, Any]:
        """The figures of a critic. Measured once, unless the size of the benchmark or its masked LM has changed."""
        file = self.out / f"seed_{seed}" / f"{name.replace('+', '_')}_{self.size.samples}.json"
        policies = [p for p in policies_of(name, self.size.critics[0]) if p in (self.only or POLICIES)]
        of = {
            "policies": policies,
            "size": json.loads(json.dumps(asdict(self.size))),
            "model": str(self.model),
        }
        if file.exists() and (stored := json.loads(file.read_text())) | of == stored:
            return stored["figures"]
        trained = self.trained(seed, name)
        found = {
            "detection": detection(trained, self.size.texts),
            "samples": samples(trained, policies, self.size),
            "infilling": gaps(trained, policies, self.size),
        }
        if not name.startswith("joint") and "+" not in name:
            found["cost"] = cost(trained)
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(file, of | {"figures": found})
        return found


def policies_of(critic: str, first: str) -> tuple[str, ...]:
    """The policies that are measured with a critic. Frozen critics share their generator, so one of them has them all."""
    if critic == first:
        return POLICIES
    return (AGAINST, *SHORT) if critic.startswith("joint") else SHORT


# --------------------------------------------------------------------------------------------------- measurements


def detection(trained: Trained, texts: int) -> dict[str, Any]:
    """Passes -> AUROC of the critic and of the stored confidence, each with an interval over texts, and the difference."""
    found = {}
    for passes in FORWARD_PASSES:
        views = error_detection(trained, "sticky", MASKED_SHARE, passes, texts)["views"]
        found[str(passes)] = {
            "critic": views["critic_raw"]["auroc"],
            "confidence": views["confidence"]["auroc"],
            "critic_over_confidence": views["critic_raw"]["auroc_over_confidence"],
            "blend": views["critic_blend"]["auroc"],
        }
    return found


def samples(trained: Trained, policies: Sequence[str], size: Size) -> dict[str, Any]:
    """Policy -> NFE -> NLL per character at the 4-gram entropy of real text, and the passes that were counted."""
    real = metrics.ngram_entropy(characters(trained.texts(trained.held_out[: size.samples])), 4)
    found: dict[str, Any] = {"real": {"fourgram_entropy": real}}
    for policy in tqdm(policies, desc="samples", unit="policy"):
        runs = unconditional(trained, policy, size.nfe, size.samples, size.temperatures)["runs"]
        for nfe in size.nfe:
            points = [run for run in runs if run["nfe"] == nfe]
            if points:
                found.setdefault(policy, {})[str(nfe)] = {
                    "passes": points[0]["passes"],
                    "at_entropy": {
                        bound: _at_entropy(points, bound, real) for bound in ("value", "low", "high")
                    },
                    "runs": [
                        {k: p[k] for k in ("temperature", "fourgram_entropy", "reference_nll")}
                        for p in points
                    ],
                }
    return found


def _at_entropy(points: Sequence[dict[str, Any]], bound: str, real: float) -> float | None:
    """None if the samples are at no temperature as diverse as real text."""
    found = at_entropy([(p["fourgram_entropy"], p["reference_nll"][bound]) for p in points], real)
    return found if np.isfinite(found) else None


def gaps(trained: Trained, policies: Sequence[str], size: Size) -> dict[str, Any]:
    """NFE -> policy -> share of correct tokens in sticky gaps of 60 % of held-out texts."""
    lines = {policy: (policy, {}) for policy in policies}
    return {
        str(nfe): {
            name: {
                "accuracy": row["accuracy"],
                "over_truth": row["reference_over_truth"],
                "passes": row["passes"],
            }
            for name, row in infilling(trained, MASKED_SHARE, nfe, lines, size.samples)["policies"].items()
        }
        for nfe in size.nfe
    }


@torch.no_grad()
def cost(trained: Trained, repeats: int = 15) -> dict[str, float]:
    """Of a pass with the critic's head, and through the interface, as multiples of the masked LM's own pass.

    Both sides are timed in turns, and the medians of their ratios count.
    """
    model: Any = trained.model
    stock = open_pretrained(trained.config.pretrained).model.to(trained.runtime.device)
    stock.load_state_dict(model.backbone.state_dict())
    rows = torch.from_numpy(trained.held_out[:32])
    with_head = {head: _timer(lambda head=head: model(rows, head=head)) for head in ("lm", "both")}
    framed = model.frame(rows, None)[0]
    direct = _timer(lambda: stock(input_ids=framed))
    assert torch.equal(model(rows, head="both").logits, model(rows).logits)
    times = np.array(
        [[clock() for clock in (direct, with_head["lm"], with_head["both"])] for _ in range(repeats)]
    )
    stock_time, ours, both = times[3:].T
    return {"interface": float(np.median(stock_time / ours)), "critic": float(np.median(both / ours) - 1)}


def _timer(call: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return seconds


def measure(runs: Runs, seeds: Sequence[int], critics: Sequence[str]) -> dict[str, Any]:
    """All figures: seed -> critic -> measurements. `means` are over seeds."""
    found: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for name in critics:
            found.setdefault(str(seed), {})[name] = figures = runs.measured(seed, name)
            print(_line(seed, name, figures), flush=True)
    return {"seeds": found, "means": means(found, runs.size.critics[0])}


def means(found: dict[str, dict[str, Any]], first: str) -> dict[str, Any]:
    """Critic -> means over seeds with their intervals.

    Args:
        found: seed -> critic -> measurements.
        first: the critic whose measurements of `ancestral` count for all frozen ones.

    Returns:
        detection: passes -> AUROC of critic and stored confidence, their difference, and the difference to the first critic.
        samples: NFE -> policy -> NLL at the 4-gram entropy of real text, and its difference to `ancestral` on the same seeds.
        infilling: NFE -> policy -> share of correct tokens.
        cost: of the head in forward passes, and speed through the interface, where they were measured.
    """
    result: dict[str, Any] = {}
    for name in next(iter(found.values())):
        own = [of_seed[name] for of_seed in found.values()]
        firsts = [of_seed.get(first) for of_seed in found.values()]
        result[name] = {
            "detection": {
                passes: {
                    view: over_seeds([of["detection"][passes][view] for of in own])
                    for view in ("critic", "confidence", "critic_over_confidence")
                }
                | {f"over_{first}": _over([_auroc(of, passes) for of in own], [_auroc(of, passes) for of in firsts])}
                for passes in map(str, FORWARD_PASSES)
            },
            "samples": {
                nfe: {
                    policy: {
                        "nll": over_seeds([_nll(of, policy, nfe) for of in own]),
                        f"over_{AGAINST}": _over(
                            [_nll(of, policy, nfe) for of in own],
                            [_nll(of if AGAINST in of["samples"] else one, AGAINST, nfe)
                             for of, one in zip(own, firsts, strict=True)],
                        ),
                    }
                    for policy in own[0]["samples"]
                    if policy != "real"
                }
                for nfe in own[0]["infilling"]
            },
            "infilling": {
                nfe: {p: over_seeds([of["infilling"][nfe][p]["accuracy"] for of in own]) for p in policies}
                for nfe, policies in own[0]["infilling"].items()
            },
            "cost": {what: over_seeds([of["cost"][what] for of in own]) for what in own[0].get("cost", ())},
        }  # fmt: skip
    return result


def _auroc(figures: dict[str, Any] | None, passes: str) -> float | None:
    return None if figures is None else figures["detection"][passes]["critic"]["value"]


def _nll(figures: dict[str, Any] | None, policy: str, nfe: str) -> float | None:
    """None if the policy was not measured, or its samples are not as diverse as real text at any temperature."""
    if figures is None or nfe not in figures["samples"].get(policy, {}):
        return None
    return figures["samples"][policy][nfe]["at_entropy"]["value"]


def _over(values: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any] | None:
    """The mean over seeds of paired differences, with its interval."""
    pairs = zip(values, others, strict=True)
    return over_seeds([None if a is None or b is None else a - b for a, b in pairs])


def _line(seed: int, name: str, found: dict[str, Any]) -> str:
    parts = []
    for passes, views in found["detection"].items():
        critic, confidence = views["critic"], views["confidence"]
        parts.append(
            f"AUROC after {passes}: critic {critic['value']:.3f} ({critic['low']:.3f} .. {critic['high']:.3f}), confidence "
            f"{confidence['value']:.3f} ({confidence['low']:.3f} .. {confidence['high']:.3f})"
        )
    for policy, by_nfe in found["samples"].items():
        parts += [
            f"{policy} at NFE {nfe}: {row['at_entropy']['value']:.3f}"
            for nfe, row in by_nfe.items()
            if policy != "real" and row["at_entropy"]["value"] is not None
        ]
    if "cost" in found:
        parts.append(
            f"critic's head {found['cost']['critic']:+.1%} of a pass; interface {found['cost']['interface']:.2f} x"
        )
    return f"seed {seed}, {name}: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained_critic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for models and runs")
    parser.add_argument("--model", type=Path, help="folder of a masked LM; without it one is made")
    parser.add_argument("--quick", action="store_true", help="small models, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="only these")
    parser.add_argument(
        "--critics",
        nargs="+",
        metavar="CRITIC",
        choices=SIZES[False].critics,
        help=f"only these, of {', '.join(SIZES[False].critics)}",
    )
    parser.add_argument(
        "--policies", nargs="+", metavar="POLICY", choices=POLICIES, default=(), help="only these"
    )
    parser.add_argument("--samples", type=int, metavar="COUNT", help="of each policy; also texts with gaps")
    result_files.add_out(parser)
    options = parser.parse_args()
    size = SIZES[options.quick]
    result = "pretrained_critic_quick" if options.quick else "pretrained_critic"
    if options.samples is not None and options.samples != size.samples:
        size = replace(size, samples=options.samples)
        result += f"_{options.samples}"
    critics = [name for name in size.critics if name in (options.critics or size.critics)]
    if not critics:
        parser.error(f"--quick measures {', '.join(size.critics)} only; choose one of them with --critics")
    for name in critics:
        of_critic = policies_of(name, size.critics[0])
        if options.policies and not set(options.policies) & set(of_critic):
            parser.error(
                f"{name} is measured with {', '.join(of_critic)}; choose one of them with --policies"
            )
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.model or make(options.folder / "english_mlm", size.lm)
    figures = measure(
        Runs(options.folder, model.resolve(), size, tuple(options.policies)),
        options.seeds or size.seeds,
        critics,
    )
    result_files.write(options.out, options.out.stem if options.out else result, figures)


if __name__ == "__main__":
    main()
