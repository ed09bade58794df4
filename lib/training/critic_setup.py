"""Set up the token critic of stage 05: its generator, its model and its objective."""

from typing import Any

from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.models.build import Checkpoint, Transfer, start_model
from lib.models.families import PRETRAINED
from lib.sections.critic import CriticConfig
from lib.sections.masking import UniformRatios
from lib.sections.models import ModelSpec
from lib.tokenization import forbidden_ids, num_ids
from lib.training.data import Splits
from lib.training.model_plans import unit_of
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.token_critic import TokenCritic
from lib.training.stage_inputs import SELECTION, open_text
from lib.training.train_model import adapter_of


def check_generator(config: Config) -> None:
    """Raise BadConfig if `critic.generator` does not name a bidirectional language model of `models`."""
    suitable = [
        n for n, s in config.models.items() if s.mode == "language_model" and s.attention == "bidirectional"
    ]
    name = config.critic.generator
    if name not in suitable:
        raise BadConfig(
            f"critic.generator is '{name}', which is not a bidirectional language model of `models`"
            f"{did_you_mean(name, suitable)}"
        )


def critic_model(stage: Stage, config: Config, tokenizer: Any) -> tuple[Any, Transfer]:
    """The generator of stage 04 with a critic on its backbone.

    With `critic.coupling: decoupled` only the critic's weights are trainable; otherwise all are.
    """
    source = stage.folder_of(unit_of(config.critic.generator), "best_model")
    spec = config.models[config.critic.generator]
    adapter = None if config.critic.coupling == "decoupled" else adapter_of(spec, config.pretrained)
    backbone = Checkpoint(source, spec.architecture.dropout, spec.architecture.dtype, adapter)
    model, transfer = start_model(
        "language_model", backbone, "bidirectional", num_ids(tokenizer), config.seed, "critic", **critic_heads(config.critic, spec),
    )  # fmt: skip
    if config.critic.coupling == "decoupled":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("critic."))
    return model, transfer


def critic_heads(critic: CriticConfig, spec: ModelSpec) -> dict[str, Any]:
    """The config keys of a critic. Raises BadConfig for settings that exclude each other."""
    heads: dict[str, Any] = {"critic_layers": critic.num_layers}
    if critic.coupling == "stop_gradient" and critic.training.activation_checkpointing:
        raise BadConfig(
            "critic.coupling stop_gradient computes layers with other weights than it trains, so they cannot be computed twice; set "
            "critic.training.activation_checkpointing to false"
        )
    if critic.lora is None:
        frozen = spec.architecture.family == PRETRAINED and critic.coupling == "decoupled"
        return heads | ({"critic_mark": "states"} if frozen else {})
    if spec.architecture.family != PRETRAINED or critic.coupling != "decoupled":
        raise BadConfig(
            f"critic.lora is for a frozen pretrained backbone, but the generator's family is {spec.architecture.family} and "
            f"critic.coupling is {critic.coupling}; set critic.lora to null, or coupling to decoupled and the family to pretrained"
        )
    if critic.training.activation_checkpointing:
        raise BadConfig(
            "critic.lora is off outside of the critic's pass, so layers cannot be computed twice; set "
            "critic.training.activation_checkpointing to false"
        )
    return heads | {"critic_rank": critic.lora.rank, "critic_alpha": critic.lora.alpha}


def critic_objective(
    stage: Stage, config: Config, context: TrainingContext, tokenizer: Any, width: int
) -> TokenCritic:
    """The critic's objective over windows of the split that its generator learned from.

    Args:
        width: tokens of a window, without [CLS].
    """
    names = (config.models[config.critic.generator].split, SELECTION, "held_out")
    texts = Splits(*(open_text(stage, name) for name in names))
    splits = WindowSplits.of(texts, width, tokenizer.pad_token_id)
    # The generator has finished its stages of unmasking; its errors are wanted at all mask ratios
    diffusion = config.diffusion.model_copy(update={"stages": (), "ratios": UniformRatios(type="uniform")})
    generator = MaskedDiffusion(context, splits, diffusion, MaskingTokens.of(tokenizer))
    return TokenCritic(config.critic, generator, forbidden_ids(tokenizer))
