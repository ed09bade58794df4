"""What a stage reads from outside outputs/, by the config: it gives this to lib.artifacts.Stage, so that a change shows.

Folders and files count by their content, a model of the Hugging Face hub by its commit. `ranker.encoder` may pin one:
`owner/name@revision`, where the revision is a commit, a tag or a branch.
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
)  # no tokenizer's files


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit."""

    name: str
    commit: str


def encoder_source(encoder: str) -> Path | HubModel:
    """The folder that `ranker.encoder` names, or the model of the hub and the commit that this process reads.

    Raises MissingInput when the hub's model cannot be had.
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
        raise MissingInput(not_had(encoder, error)) from None
    return HubModel(name, Path(file).parent.name)  # .../snapshots/<commit>/config.json


def not_had(encoder: str | Path, error: Exception) -> str:
    """What to say of a name that is no folder and cannot be had from the hub."""
    reason = str(error).strip().splitlines()[0]
    return (
        f"encoder {encoder} is no folder here and cannot be had from the hub as safetensors: {reason} "
        "Give a folder with config.json, model.safetensors and the tokenizer, or, with a network, a name on the hub "
        "and HF_HUB_OFFLINE=0"
    )


def of_examples(config: Config) -> list[Path | HubModel]:
    """Of stage 01: the encoder's tokenizer, where prompts are cut to so many of its tokens. Its weights do not count."""
    if config.ranker.encoder is None or config.ranker.prompt == "question":
        return []
    source = encoder_source(config.ranker.encoder)
    if isinstance(source, HubModel):
        return [source]
    return [p for p in sorted(source.rglob("*")) if p.is_file() and p.suffix not in WEIGHTS]


def of_candidates(config: Config) -> list[Path]:
    """Of stage 02: the masked LM that rewrites, where one is given."""
    return [Path(config.generator.checkpoint)] if config.generator.checkpoint else []


def of_models(config: Config) -> list[Path | HubModel]:
    """Of stage 04: folders that models start from, the encoder, judges, and the masked LM that fills the stream."""
    starts = [Path(s.start) for s in config.models.values() if is_folder(s, config)]
    judges = [Path(s.modifiers.judge.model) for s in config.models.values() if s.modifiers.judge is not None]
    adapted = [base for folder in starts for base in _adapted_by(folder)]
    stream = of_candidates(config) if config.stream.enabled else []
    return [*starts, *of_rankers(config), *adapted, *judges, *stream]


def of_rankers(config: Config) -> list[Path | HubModel]:
    """Of whoever reads trained rankers: the encoder, without which adapters are nothing."""
    return [] if config.ranker.encoder is None else [encoder_source(config.ranker.encoder)]


def of_policies(config: Config) -> list[Path | HubModel]:
    """Of stages 05 and 06 with critic.method ppo: all that the adapters of stage 04 are for."""
    starts = [Path(s.start) for s in config.models.values() if is_folder(s, config)]
    return [*of_rankers(config), *(base for folder in starts for base in _adapted_by(folder))]


def of_samples(config: Config) -> list[Path]:
    """Of stage 06: the texts to fill."""
    return [Path(config.sampler.infill_file)] if config.sampler.infill_file else []


def is_folder(spec: ModelSpec, config: Config) -> bool:
    """Whether a model's start is neither scratch nor something of the run."""
    return spec.start not in ("scratch", "02_generate_candidates", *config.models)


def _adapted_by(folder: Path) -> list[Path]:
    """The folder of the encoder that a ranker's adapters are for."""
    try:
        record = json.loads((folder / "ranker.json").read_text(encoding="utf-8"))
        base = Path(record["base"]["name"]) if record["lora"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [base] if base is not None and base.is_dir() else []
