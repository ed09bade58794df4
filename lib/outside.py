"""What each stage reads from outside outputs/, according to the config.

The scripts pass it to lib.artifacts.Stage, which notices changes: of files and folders by their content, of models on the
Hugging Face hub by their commit. `ranker.encoder` may name a revision: `owner/name@revision`, where the revision is a
commit, a tag or a branch.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib import durable
from lib.config import Config
from lib.errors import BadConfig, MissingInput, did_you_mean
from lib.runs import STAGES
from lib.sections.models import ModelSpec

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
)  # endings of weight files; all other files of a model may belong to its tokenizer


MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.py",
)  # of a model on the hub; never its pickles


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face hub, at one commit."""

    name: str
    commit: str


def encoder_source(encoder: str) -> Path | HubModel:
    """The folder that `ranker.encoder` names, or the model on the hub with the commit that this process reads.

    Raises MissingInput when the model cannot be downloaded.
    """
    return Path(encoder) if Path(encoder).is_dir() else _on_the_hub(encoder)


@cache
def _on_the_hub(encoder: str, what: str = "encoder") -> HubModel:
    from huggingface_hub import hf_hub_download

    name, _, revision = encoder.partition("@")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return HubModel(name, revision)
    try:
        file = hf_hub_download(name, "config.json", revision=revision or None)
    except (OSError, ValueError) as error:
        raise MissingInput(not_found(what, encoder, error)) from None
    return HubModel(name, Path(file).parent.name)  # .../snapshots/<commit>/config.json


def encoder_not_found(encoder: str | Path, error: Exception) -> str:
    """The message for an encoder that is neither a folder nor can be downloaded from the hub."""
    return not_found("encoder", encoder, error)


def not_found(what: str, name: str | Path, error: Exception) -> str:
    """The same for any model. `what`: its role or setting."""
    reason = str(error).strip().splitlines()[0]
    return (
        f"{what} {name} is not a folder, and the hub does not provide it as safetensors: {reason} "
        "Give a folder with config.json, model.safetensors and the tokenizer. With a network, give a name on the hub "
        "and set HF_HUB_OFFLINE=0"
    )


def of_examples(config: Config) -> list[Path | HubModel]:
    """For stage 01: the tokenizer of the pretrained model, and that of the encoder, if prompts are shortened to a number of
    its tokens. Not their weights.
    """
    found: list[Path | HubModel] = []
    if config.pretrained.model is not None:
        found += _without_weights(pretrained_source(config.pretrained.model))
    if config.ranker.encoder is not None and config.ranker.prompt != "question":
        found += _without_weights(encoder_source(config.ranker.encoder))
    return found


def _without_weights(source: Path | HubModel) -> list[Path | HubModel]:
    if isinstance(source, HubModel):
        return [source]
    return [p for p in sorted(source.rglob("*")) if p.is_file() and p.suffix not in WEIGHTS]


def refuse_unnamed_pretrained(config: Config) -> None:
    """Raise BadConfig if a model has a pretrained backbone and no setting says which."""
    owners = {
        "generator": config.generator,
        **{f"models.{name}": spec for name, spec in config.models.items()},
    }
    names = [name for name, owner in owners.items() if owner.architecture.family == "pretrained"]
    if names and config.pretrained.model is None:
        raise BadConfig(
            f"architecture.family is pretrained for {', '.join(names)}, and pretrained.model is null: set it to the folder of a "
            "masked LM, or to a name on the hub"
        )


def pretrained_source(model: str) -> Path | HubModel:
    """The folder that `pretrained.model` names, or the model on the hub with the commit that this process reads.

    Raises MissingInput when there is neither.
    """
    return Path(model) if Path(model).is_dir() else _on_the_hub(model, "pretrained.model")


@cache
def pretrained_folder(model: str) -> Path:
    """A folder with the files of `pretrained.model`; those of a model on the hub are downloaded.

    Raises MissingInput when there is neither a folder nor a model of that name.
    """
    source = pretrained_source(model)
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.name, revision=source.commit, allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError) as error:
        raise MissingInput(not_found("pretrained.model", model, error)) from None


def of_candidates(config: Config) -> list[Path | HubModel]:
    """For stage 02: the masked LM of generator.checkpoint, or the pretrained one that its own generator starts from.

    For task pools also the encoder, which is a baseline.
    """
    return _generator(config) + (of_rankers(config) if config.task == "pools" else [])


def _generator(config: Config) -> list[Path | HubModel]:
    """The masked LM of generator.checkpoint, or the pretrained one that the generator of stage 02 starts from."""
    if config.generator.checkpoint:
        return [Path(config.generator.checkpoint)]
    if config.pretrained.model is not None and config.generator.architecture.family == "pretrained":
        return [pretrained_source(config.pretrained.model)]
    return []


def of_model(spec: ModelSpec, config: Config) -> list[Path | HubModel]:
    """For one model of stage 04: the folder it starts from, its encoder, its judge, and the masked LM of the stream."""
    starts: list[Path | HubModel] = [Path(spec.start)] if is_folder(spec, config) else []
    if spec.start == "scratch" and config.pretrained.model and spec.architecture.family == "pretrained":
        starts.append(pretrained_source(config.pretrained.model))
    encoders = of_rankers(config) if spec.mode == "ranker" else []
    adapted = [base for folder in starts if isinstance(folder, Path) for base in _adapted_by(folder)]
    judges = [] if spec.modifiers.judge is None else [Path(spec.modifiers.judge.model)]
    stream = _generator(config) if spec.learns_from_shards and config.stream.enabled else []
    return [*starts, *encoders, *adapted, *judges, *stream]


def of_rankers(config: Config) -> list[Path | HubModel]:
    """For stages that load trained rankers: the encoder, which their adapters need."""
    return [] if config.ranker.encoder is None else [encoder_source(config.ranker.encoder)]


def of_policies(config: Config) -> list[Path | HubModel]:
    """For stages 05 and 06 with critic.method ppo: the encoders that the adapters of stage 04 need."""
    starts = [Path(s.start) for s in config.models.values() if is_folder(s, config)]
    return [*of_rankers(config), *(base for folder in starts for base in _adapted_by(folder))]


def of_samples(config: Config) -> list[Path]:
    """For stage 06: the texts whose gaps are filled."""
    return [Path(config.sampler.infill_file)] if config.sampler.infill_file else []


def is_folder(spec: ModelSpec, config: Config) -> bool:
    """Whether a model starts from a folder outside the run, not from scratch or from another model of the run."""
    return spec.start not in ("scratch", "02_generate_candidates", *config.models)


def _adapted_by(folder: Path) -> list[Path]:
    """The folder of the encoder that the adapters of a ranker were trained on."""
    try:
        record = durable.read_json(folder / "ranker.json")
        base = Path(record["base"]["name"]) if record["lora"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [base] if base is not None and base.is_dir() else []


def refuse_unknown_starts(config: Config) -> None:
    """Raises BadConfig for a start that looks like the name of a model, but is neither a model nor a folder."""
    candidates = STAGES[2]
    known = ["scratch", candidates, *config.models]
    for name, spec in config.models.items():
        start = spec.start
        if start not in known and start.isidentifier() and not Path(start).exists():
            raise BadConfig(
                f"models.{name}.start is '{start}', which is not scratch, {candidates}, a model of `models` or a folder"
                f"{did_you_mean(start, known)}"
            )
