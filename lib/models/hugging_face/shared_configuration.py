"""Checks that the configurations of both model families share.

The modeling and configuration files of this folder import each other and the two shared files by relative imports. They import
nothing else of the project. So transformers copies all that a model needs into its saved folder, and the folder loads
without the project. A modeling file imports both shared files directly: of a local folder, transformers 5.5 copies only
direct imports to its cache.
"""

import copy
import difflib
import functools
import math
from typing import TypeVar

from transformers import PreTrainedConfig

SCORE_ACTIVATIONS = ("none", "sigmoid")
AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)


class ConfigProblems:
    """Collects every value of a config that no model can be built from, and raises them as one ValueError."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.messages: list[str] = []

    def need(self, condition: bool, message: str) -> None:
        if not condition:
            self.messages.append(message)

    def integers(self, **minimums: int) -> None:
        """These keys are integers of at least their minimum."""
        for key, minimum in minimums.items():
            value = getattr(self.config, key)
            right = is_int(value) and value >= minimum
            self.need(right, f"{key} must be an integer of at least {minimum}, got {value!r}")

    def heads_divide(self) -> bool:
        """Whether the attention heads divide the hidden size; if not, that is a problem."""
        size, heads = self.config.hidden_size, self.config.num_attention_heads
        divides = size % heads == 0
        self.need(divides, f"hidden_size {size} is not divisible by num_attention_heads {heads}")
        return divides

    def token_ids(self, *names: str) -> None:
        """The special tokens of these names have an id inside the vocabulary, or None."""
        size = self.config.vocab_size
        for key in (f"{name}_token_id" for name in names):
            value = getattr(self.config, key)
            inside = value is None or (is_int(value) and 0 <= value < size)
            self.need(inside, f"{key} must be None or an id below vocab_size {size}, got {value!r}")

    def choice(self, key: str, choices: tuple) -> None:
        """The key has one of these values."""
        value = getattr(self.config, key)
        self.need(value in choices, f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")

    def probabilities(self, *keys: str) -> None:
        """These keys lie in [0, 1). `classifier_dropout` may also be None."""
        for key in keys:
            value = getattr(self.config, key)
            is_default = key == "classifier_dropout" and value is None
            self.need(is_default or is_number(value, 0, 1), f"{key} must lie in [0, 1), got {value!r}")

    def positive(self, key: str) -> None:
        """The key is a positive number."""
        value = getattr(self.config, key)
        self.need(is_number(value) and value > 0, f"{key} must be a positive number, got {value!r}")

    def initializer_range(self) -> None:
        std = self.config.initializer_range
        self.need(
            std is None or (is_number(std) and std > 0),
            f"initializer_range must be None or positive, got {std!r}",
        )

    def critic_layers(self) -> None:
        count = self.config.critic_layers
        self.need(
            count is None or (is_int(count) and count >= 0),
            f"critic_layers must be None or an integer of at least 0, got {count!r}",
        )

    def raise_if_any(self) -> None:
        if self.messages:
            raise ValueError(f"{type(self.config).__name__}: {'; '.join(self.messages)}")


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value, minimum: float = -math.inf, below: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value < below


def refuse_unknown_keys(cls: type, kwargs: dict, extra: frozenset[str] = frozenset()) -> None:
    """Raise ValueError for a key that is neither the config's own, nor of transformers, nor in `extra`.

    The message names the nearest right key.
    """
    known = _inherited_keys() | extra
    own = [name for name in cls.__init__.__annotations__ if name != "return"]
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, [*own, *known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(own)}"
            raise ValueError(f"{cls.__name__}: unknown key {key!r}{hint}")


@functools.cache
def _inherited_keys() -> frozenset[str]:
    """Keys that transformers itself writes to a config.json or passes while loading one."""
    passed_while_loading = {
        "attn_implementation", "experts_implementation", "auto_map", "distributed_config", "model_type", "name_or_path",
        "num_labels", "output_attentions", "quantization_config", "torch_dtype", "_attn_implementation", "_commit_hash",
        "_name_or_path",
    }  # fmt: skip
    return frozenset(PreTrainedConfig().to_dict()) | passed_while_loading


def require_token_classes(config: PreTrainedConfig) -> int:
    """The number of classes of a token classifier. Raises ValueError for fewer than two."""
    num_labels = config.num_labels or 0
    if num_labels < 2:
        raise ValueError(f"token classification needs num_labels of at least 2, got {config.num_labels}")
    return num_labels


def sequence_config(config: AnyConfig) -> AnyConfig:
    """The config as a sequence classifier keeps it.

    Scores in [0, 1] are a regression: otherwise the text-classification pipeline would apply a second sigmoid. The caller's
    config is not changed.

    Raises:
        ValueError: scores in [0, 1] are asked for, with more than one label or as another problem than a regression.
    """
    if config.score_activation != "sigmoid":
        return config
    if config.num_labels != 1:
        raise ValueError(f'score_activation="sigmoid" needs num_labels=1, got {config.num_labels}')
    if config.problem_type is None:
        config = copy.copy(config)
        config.problem_type = "regression"
    if config.problem_type != "regression":  # its loss would apply a second sigmoid
        raise ValueError(
            f'score_activation="sigmoid" needs problem_type "regression" or None, got "{config.problem_type}"'
        )
    return config
