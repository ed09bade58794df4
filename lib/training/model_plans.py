"""The models of stage 04 as units: what each of them uses and reads, and in which order they are trained."""

from functools import partial

from lib import outside
from lib.artifacts import Stage
from lib.config import Config
from lib.errors import UsageError, did_you_mean
from lib.runs import RunArgs, load_manifest
from lib.sections.models import ModelSpec, dependency_order
from lib.stage.unfinished import config_changes
from lib.units import UnitPlan

STAGE = "04_train"
EXAMPLES, CANDIDATES, REWARDS = "01_prepare_dataset", "02_generate_candidates", "03_build_rewards"


def plan_models(config: Config) -> dict[str, UnitPlan]:
    """Name of each model -> its plan, in the order of the config. Raises BadConfig for an unknown start."""
    outside.refuse_unknown_starts(config)
    return {
        name: UnitPlan(
            _uses(name, spec, config), _reads(spec, config), partial(outside.of_model, spec, config)
        )
        for name, spec in config.models.items()
    }


def choose_models(config: Config, args: RunArgs) -> tuple[str, ...]:
    """The models that --only or --mode select, by default all; each after the model that it starts from.

    Raises UsageError for a name that the config does not have.
    """
    for name in args.only:
        if name not in config.models:
            raise UsageError(
                f"--only {name}: the config has no such model{did_you_mean(name, config.models)}"
            )
    order = dependency_order(config.models)
    if args.only:
        return tuple(name for name in order if name in args.only)
    return tuple(name for name in order if args.only_mode in (None, config.models[name].mode))


def unit_of(name: str) -> str:
    """The name of a model as a unit, for what stages read: `04_train/judge`."""
    return f"{STAGE}/{name}"


def trained_models(stage: Stage, config: Config) -> dict[str, dict]:
    """Name -> manifest of the models that are complete and were made with these settings, for tables of results.

    A stage reads only some of them: it does not depend on the others.
    """
    found = {}
    for name, plan in plan_models(config).items():
        manifest = load_manifest(stage.folder_of_stage(unit_of(name)))
        if manifest is not None and not config_changes(manifest["config"], config.slice(plan.uses)):
            found[name] = manifest
    return found


def _uses(name: str, spec: ModelSpec, config: Config) -> tuple[str, ...]:
    """The settings that a model depends on, besides those that the stages before it depend on."""
    uses = ["seed", "device", "precision", f"models.{name}"]
    if spec.mode == "language_model" and spec.attention == "bidirectional":
        uses.append("diffusion")
    if spec.architecture.family == "pretrained":
        uses.append("pretrained")
    if spec.mode == "ranker":
        uses.append("ranker")
    if spec.mode in ("token_classifier", "sequence_scorer"):
        uses += [f"data.{key}" for key in ("label_key", "label_classes", "spans_key", "span_classes")]
    if spec.learns_from_shards:
        uses.append("stream" if config.stream.enabled else "stream.enabled")
    return tuple(uses)


def _reads(spec: ModelSpec, config: Config) -> tuple[str, ...]:
    """The stages and models that a model reads. A language model needs no candidates."""
    reads = [EXAMPLES] if spec.mode == "language_model" else [EXAMPLES, CANDIDATES, REWARDS]
    if spec.start in config.models:
        reads.append(unit_of(spec.start))
    elif spec.start == CANDIDATES and CANDIDATES not in reads:
        reads.append(CANDIDATES)
    return tuple(reads)
