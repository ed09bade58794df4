"""Set up the token critic of stage 05: its generator, its model and its objective."""

from typing import Any

from lib.artifacts import Stage
from lib.config import Config
from lib.errors import BadConfig, did_you_mean
from lib.models.build import Checkpoint, Transfer, start_model
from lib.sections.masking import UniformRatios
from lib.training.data import Splits
from lib.training.model_plans import unit_of
from lib.training.objectives.base import TrainingContext
from lib.training.objectives.language_model import MaskedDiffusion, MaskingTokens, WindowSplits
from lib.training.objectives.token_critic import TokenCritic
from lib.training.stage_inputs import SELECTION, open_text


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
    model, transfer = start_model(
        "language_model", Checkpoint(source, spec.architecture.dropout, spec.architecture.dtype), "bidirectional", len(tokenizer), config.seed, "critic",
        critic_layers=config.critic.num_layers,
    )  # fmt: skip
    if config.critic.coupling == "decoupled":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("critic."))
    return model, transfer


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
    return TokenCritic(config.critic, generator, sorted(set(tokenizer.all_special_ids)))
