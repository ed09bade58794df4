"""What each stage reads from outside outputs/, according to the config.

The scripts pass it to lib.artifacts.Stage, which notices changes: of files and folders by their content, of models on the
Hugging Face hub by their commit. `ranker.encoder` may name a revision: `owner/name@revision`, where the revision is a
commit, a tag or a branch.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib.config import Config
from lib.errors import MissingInput
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
def _on_the_hub(encoder: str) -> HubModel:
    from huggingface_hub import hf_hub_download

    name, _, revision = encoder.partition("@")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return HubModel(name, revision)
    try:
        file = hf_hub_download(name, "config.json", revision=revision or None)
    except (OSError, ValueError) as error:
        raise MissingInput(encoder_not_found(encoder, error)) from None
    return HubModel(name, Path(file).parent.name)  # .../snapshots/<commit>/config.json


def encoder_not_found(encoder: str | Path, error: Exception) -> str:
    """The message for an encoder that is neither a folder nor can be downloaded from the hub."""
    reason = str(error).strip().splitlines()[0]
    return (
        f"encoder {encoder} is not a folder, and the hub does not provide it as safetensors: {reason} "
        "Give a folder with config.json, model.safetensors and the tokenizer. With a network, give a name on the hub "
        "and set HF_HUB_OFFLINE=0"
    )


def of_examples(config: Config) -> list[Path | HubModel]:
    """For stage 01: the tokenizer of the encoder, if prompts are shortened to a number of its tokens; not its weights."""
    if config.ranker.encoder is None or config.ranker.prompt == "question":
        return []
    source = encoder_source(config.ranker.encoder)
    if isinstance(source, HubModel):
        return [source]
    return [p for p in sorted(source.rglob("*")) if p.is_file() and p.suffix not in WEIGHTS]


def of_candidates(config: Config) -> list[Path | HubModel]:
    """For stage 02: the masked LM of generator.checkpoint, if it is set; for task pools the encoder, which is a baseline."""
    checkpoints: list[Path | HubModel] = (
        [Path(config.generator.checkpoint)] if config.generator.checkpoint else []
    )
    return checkpoints + (of_rankers(config) if config.task == "pools" else [])


def _checkpoint(config: Config) -> list[Path]:
    return [Path(config.generator.checkpoint)] if config.generator.checkpoint else []


def of_model(spec: ModelSpec, config: Config) -> list[Path | HubModel]:
    """For one model of stage 04: the folder it starts from, its encoder, its judge, and the masked LM of the stream."""
    starts = [Path(spec.start)] if is_folder(spec, config) else []
    encoders = of_rankers(config) if spec.mode == "ranker" else []
    adapted = [base for folder in starts for base in _adapted_by(folder)]
    judges = [] if spec.modifiers.judge is None else [Path(spec.modifiers.judge.model)]
    stream = _checkpoint(config) if spec.learns_from_shards and config.stream.enabled else []
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
        record = json.loads((folder / "ranker.json").read_text(encoding="utf-8"))
        base = Path(record["base"]["name"]) if record["lora"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [base] if base is not None and base.is_dir() else []
