"""Every stage, started in every supported manner: what is started at once, what continues it, and what must come out."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.inputs import MODEL, RANKED, SCORED, TEXT, make_inputs
from lib.runs import RANK, score_stage

SIZES = (1, 2, 4)  # processes of a training with four parts

# Runs of a few seconds, with the code paths of long ones: parts, dropout, modifiers, several checkpoints
SMALL = (
    "training.parts=4", "training.steps=4", "training.evaluate_every=2", "training.checkpoint_every=1",
    "training.evaluation_examples=16", "architecture.num_hidden_layers=1", "architecture.hidden_size=32",
    "tokenizer.examples_per_part=256", "candidates.rows_per_group=512",
)  # fmt: skip
PLAIN = (
    *SMALL, "data.fractions={train: 0.3, held_out: 0.04, reference: 0.66}", "critic.training.steps=3",
    "generator.training.steps=4", "architecture.dropout=0.1", "sampler.num_samples=4", "sampler.nfe=[4]",
    "sampler.policies=[ancestral, critic]",
    *(f"models.{name}.training.steps=3" for name in ("generator", "reference_lm", "ar_baseline", "inspector", "judge", "ranker")),
)  # fmt: skip
FINQA = (
    *SMALL, "models.ranker.training.steps=3", "models.ranker_blind.training.steps=2", "critic.training.steps=2",
    "ranker.prompt_tokens=16", "ranker.candidate_tokens=24", "finqa.pools.train_draws=2", "finqa.pools.bank=12",
)  # fmt: skip
WITHOUT = ("reference_lm", "ar_baseline", "inspector", "ranker")  # models that a tiny run lacks
TINY = (
    *(setting for setting in PLAIN if not setting.startswith(tuple(f"models.{name}." for name in WITHOUT))),
    *(f"models.{name}=null" for name in WITHOUT), "training.parts=2", "models.generator.training.steps=2",
    "models.judge.start=generator", "models.judge.training.steps=2", "critic.training.steps=2", "generator.training.steps=2",
)  # fmt: skip
INPUTS = "{inputs}"  # the folder of the files of benchmarks/faults/inputs.py
PRETRAINED = (
    *SMALL, f"pretrained.model={INPUTS}/{MODEL}", f"data.path={INPUTS}/{TEXT}", "data.passage_characters=48",
    "data.block_characters=256", "data.selection_fraction=0.1", "tokenizer.unknown=unk", "architecture.context=64",
    "candidates.per_example=2", "generator.training.steps=2", "training.batch_size=8", "critic.training.steps=2",
    "models.ar_baseline=null", "models.ranker.training.batch_size=4", "sampler.num_samples=2", "sampler.nfe=[4]",
    "sampler.policies=[ancestral, critic]",
    *(f"models.{name}.training.steps=3" for name in ("generator", "reference_lm", "inspector", "judge", "ranker")),
)  # fmt: skip
POOLS = (
    *SMALL, "models.ranker.training.steps=4", "models.ranker.training.evaluate_every=2", "ranker.prompt_tokens=24",
    "ranker.candidate_tokens=24", "tokenizer.examples_per_part=32", "candidates.rows_per_group=128",
)  # fmt: skip
STREAM = ("stream.enabled=true", "stream.shard_examples=64", "stream.timeout_seconds=60")
FINQA_CONFIG = ("--config", "configs/finqa.yaml")


def flags(settings: tuple[str, ...], *config: str) -> list[str]:
    return [*config, "--quick_test", *(word for setting in settings for word in ("--set", setting))]


BASES = {
    "text": flags(PLAIN),
    "tiny": flags(TINY),
    "stream": flags((*PLAIN, *STREAM)),
    "finqa": flags(FINQA, *FINQA_CONFIG),
    "pretrained": flags(PRETRAINED, "--config", "configs/pretrained.yaml"),
    "pools": flags(POOLS, "--config", "configs/pools.yaml"),
}
FILE_FLAGS = {
    "text": (("--score", SCORED), ("--rank", RANKED)),
    "pretrained": (("--score", SCORED),),
    "pools": (("--rank", RANKED),),
}  # base -> what script 06 does with the files of a user, besides its stage
_inputs = Path("outputs/fault_inputs")


def use_inputs(folder: Path) -> None:
    """Make the files of a user, and let all commands from now on read them there."""
    global _inputs
    _inputs = folder.absolute()
    make_inputs(_inputs)


def file_stage(flag: str, name: str) -> str:
    """The folder of the run that `06_sample.py FLAG FILE` makes."""
    return score_stage(_inputs / name, RANK) if flag == "--rank" else score_stage(_inputs / name)


@dataclass(frozen=True)
class Command:
    """One process. `rank` and `size` are those of a launcher such as torchrun; without one, `size` is 1."""

    argv: tuple[str, ...]
    rank: int = 0
    size: int = 1


Crew = list[Command]  # started at the same time


@dataclass(frozen=True)
class Scenario:
    """A stage and how it is started.

    Attributes:
        stage, name: row and column of the table.
        base: whose flags and undisturbed run it has.
        begins: the stages of the undisturbed run that are there at the start.
        crew: draws the processes that are started at once.
        last: commands, one after the other, that complete the stage if the crew does not.
        makes: the folders of the run that are compared.
        orphans: whether processes that a killed one leaves behind may stay while the next one works.
        seconds: the longest that one crew may take.
    """

    stage: str
    name: str
    base: str
    begins: tuple[str, ...]
    crew: Callable[[random.Random, Path], Crew]
    makes: tuple[str, ...]
    last: Callable[[Path], list[Command]] = field(default=lambda run: [])
    orphans: bool = True
    seconds: float = 120


STAGES = ("00_check_data", "01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "04_train",
          "05_train_critic", "06_sample")  # fmt: skip
MODELS = ("generator", "reference_lm", "ar_baseline", "inspector", "judge", "ranker")


def command(base: str, stage: str, run: Path, *more: str, rank: int = 0, size: int = 1) -> Command:
    words = (f"{stage}.py", *BASES[base], "--run_dir", str(run), *more)
    return Command(tuple(word.replace(INPUTS, str(_inputs)) for word in words), rank, size)


def of_file(base: str, flag: str, name: str, run: Path, *more: str) -> Command:
    """`06_sample.py --score FILE` or `--rank FILE`."""
    return command(base, "06_sample", run, flag, str(_inputs / name), *more)


def _alone(base: str, stage: str, *more: str) -> Callable[[random.Random, Path], Crew]:
    return lambda draw, run: [command(base, stage, run, *more)]


def _launched(base: str, stage: str, *more: str) -> Callable[[random.Random, Path], Crew]:
    def crew(draw: random.Random, run: Path) -> Crew:
        size = draw.choice(SIZES)
        return [command(base, stage, run, *more, rank=rank, size=size) for rank in range(size)]

    return crew


def _in_parts(base: str, stage: str) -> Callable[[random.Random, Path], Crew]:
    def crew(draw: random.Random, run: Path) -> Crew:
        count = draw.choice((2, 3))
        return [command(base, stage, run, "--part", f"{share}/{count}") for share in range(count)]

    return crew


def _executor(base: str, stage: str, kind: str) -> Callable[[random.Random, Path], Crew]:
    def crew(draw: random.Random, run: Path) -> Crew:
        workers = draw.choice((1, 2))
        return [command(base, stage, run, "--set", f"executor={{type: {kind}, workers: {workers}}}")]

    return crew


def _models_at_once(draw: random.Random, run: Path) -> Crew:
    """Two commands that train different models, each after the one that it starts from."""
    chains = (("generator", "inspector", "judge", "ranker"), ("reference_lm", "ar_baseline"))
    return [
        command("text", "04_train", run, *(word for name in chain for word in ("--only", name)))
        for chain in chains
    ]


def _streaming(draw: random.Random, run: Path) -> Crew:
    producer = command("stream", "02_generate_candidates", run, "--stream")
    return [command("stream", "04_train", run), producer]


def _pipeline(base: str) -> Callable[[random.Random, Path], Crew]:
    return lambda draw, run: [Command(("-m", "lib.pipeline", *BASES[base], "--run_dir", str(run)))]


def all_scenarios(with_ray: bool) -> list[Scenario]:
    """All scenarios, in the order of the table."""
    scenarios = []
    for base in ("text", "finqa", "pretrained", "pools"):
        for number, stage in enumerate(STAGES):
            label = stage if base == "text" else f"{stage} ({base})"
            before = STAGES[:number]
            scenarios.append(Scenario(label, "one process", base, before, _alone(base, stage), (stage,)))
            overwrite = _alone(base, stage, "--overwrite")
            again = Scenario(label, "--overwrite", base, STAGES[: number + 1], overwrite, (stage,))
            if base == "text" or (base == "finqa" and number in (2, 5)) or (base != "finqa" and number == 4):
                scenarios.append(again)
            if number in (1, 2, 3):
                end = lambda run, base=base, stage=stage: [command(base, stage, run)]  # noqa: E731
                scenarios.append(
                    Scenario(label, "--part", base, before, _in_parts(base, stage), (stage,), end, seconds=60)
                )
                kinds = ["processes", *(["ray"] if with_ray and base == "text" else [])]
                scenarios += [
                    Scenario(label, f"executor {kind}", base, before, _executor(base, stage, kind), (stage,), orphans=kind != "ray")
                    for kind in kinds
                ]  # fmt: skip
            if number in (4, 5):
                scenarios.append(Scenario(label, "torchrun", base, before, _launched(base, stage), (stage,)))
        for flag, name in FILE_FLAGS.get(base, ()):
            label, folder = (
                f"06_sample {flag}" + (f" ({base})" if base != "text" else ""),
                file_stage(flag, name),
            )
            for way, more in (("one process", ()), ("--overwrite", ("--overwrite",))):
                before = (*STAGES, folder) if more else STAGES
                crew = lambda draw, run, words=(base, flag, name), more=more: [of_file(*words, run, *more)]  # noqa: E731
                if base == "text" or not more:
                    scenarios.append(Scenario(label, way, base, before, crew, (folder,)))
    scenarios += [
        Scenario("04_train", "models at once", "text", STAGES[:4], _models_at_once, ("04_train",),
            lambda run: [command("text", "04_train", run)]),
        Scenario("04_train", "from a stream", "stream", STAGES[:4], _streaming, ("04_train",)),
        Scenario("all stages", "make pipeline", "text", (), _pipeline("text"), STAGES),
        Scenario("all stages (finqa)", "make pipeline", "finqa", (), _pipeline("finqa"), STAGES),
    ]  # fmt: skip
    return scenarios
