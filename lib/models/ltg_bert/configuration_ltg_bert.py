"""Configuration of LTG-BERT.

This file and `modeling_ltg_bert.py` import nothing of this project, so that a saved folder carries its own code.
"""

import difflib
import functools
import math

from transformers import PreTrainedConfig

SCORE_ACTIVATIONS = ("none", "sigmoid")
SIZES = {  # as published; everything else is equal
    "xs": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048},
}


@functools.cache
def _inherited_keys() -> frozenset[str]:
    """Keys that transformers itself writes to a config.json or passes while loading one."""
    passed_while_loading = {
        "attn_implementation", "experts_implementation", "auto_map", "distributed_config", "model_type", "name_or_path",
        "num_labels", "output_attentions", "quantization_config", "torch_dtype", "_attn_implementation", "_commit_hash",
        "_name_or_path", "use_cache",  # Trainer sets it on any model, and saves it
    }  # fmt: skip
    return frozenset(PreTrainedConfig().to_dict()) | passed_while_loading


# trf-ignore: TRF010  (check() refuses more than types, all problems at once)
class LtgBertConfig(PreTrainedConfig):
    """Shape and behaviour of an `LtgBert*` model; the defaults are the published base model.

    Args:
        vocab_size: number of token ids.
        hidden_size: width D of the residual stream, divisible by `num_attention_heads`.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads per block.
        intermediate_size: inner width of the gated feed-forward layer.
        max_position_embeddings: distance at which the logarithmic buckets end. Longer inputs are read: all greater
            distances share the last bucket, and the model has seen none of them in training.
        position_bucket_size: relative positions have 2 * position_bucket_size - 1 buckets, exact up to half of it.
        layer_norm_eps: added to the variance in every layer norm.
        hidden_dropout_prob: dropout of embeddings, relative positions and of each block's two outputs.
        attention_probs_dropout_prob: dropout of attention weights.
        classifier_dropout: dropout before the last layer of the classifiers; None means `hidden_dropout_prob`.
        initializer_range: standard deviation of the initial matrices; None means sqrt(2 / (5 D)) (Nguyen & Salazar
            2019). The values are cut at two standard deviations.
        tie_word_embeddings: the last layer of the language-model head is the embedding matrix.
        critic_layers: None for no critic head; n >= 0 for n transformer blocks and a head of width 1. Not part of the
            published model.
        score_activation: "none", or "sigmoid" for a sequence head with one label whose score lies in [0, 1].
        unk_token_id, cls_token_id, sep_token_id, pad_token_id, mask_token_id: special ids, each inside the vocabulary
            or None. The defaults are those of the published tokenizer script.
        bos_token_id, eos_token_id: not used by the model; kept for tokenizers.

    Raises:
        ValueError: on an unknown key (the message names the nearest right one) or a value that makes no model.
    """

    model_type = "ltg_bert"

    def __init__(
        self,
        vocab_size: int = 16384,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 2048,
        max_position_embeddings: int = 512,
        position_bucket_size: int = 32,
        layer_norm_eps: float = 1e-7,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        initializer_range: float | None = None,
        tie_word_embeddings: bool = True,
        critic_layers: int | None = None,
        score_activation: str = "none",
        unk_token_id: int | None = 0,
        cls_token_id: int | None = 1,
        sep_token_id: int | None = 2,
        pad_token_id: int | None = 3,
        mask_token_id: int | None = 4,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs,
    ):
        self._refuse_unknown(kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.position_bucket_size = position_bucket_size
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.critic_layers = critic_layers
        self.score_activation = score_activation
        self.unk_token_id = unk_token_id
        self.cls_token_id = cls_token_id
        self.sep_token_id = sep_token_id
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.check()
        super().__init__(**kwargs)

    @classmethod
    def published(cls, size: str, **changes) -> "LtgBertConfig":
        """The published "xs", "small" or "base" configuration, with `changes`."""
        if size not in SIZES:
            raise ValueError(f"LtgBertConfig: no published size {size!r}; there are {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **changes})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raise one ValueError that lists every value no model can be built from."""
        problems = []

        def need(condition: bool, message: str) -> None:
            if not condition:
                problems.append(message)

        for key, least in (
            ("vocab_size", 1), ("hidden_size", 1), ("num_hidden_layers", 0), ("num_attention_heads", 1),
            ("intermediate_size", 1), ("max_position_embeddings", 2), ("position_bucket_size", 2),
        ):  # fmt: skip
            value = getattr(self, key)
            need(
                _is_int(value) and value >= least,
                f"{key} must be an integer of at least {least}, got {value!r}",
            )
        if not problems:
            width, heads = self.hidden_size, self.num_attention_heads
            need(width % heads == 0, f"hidden_size {width} is not divisible by num_attention_heads {heads}")
            buckets, longest = self.position_bucket_size, self.max_position_embeddings
            need(
                longest - 1 > buckets // 2,
                f"max_position_embeddings {longest} must exceed half of position_bucket_size {buckets} by 2 at least",
            )
            for key in ("unk", "cls", "sep", "pad", "mask"):
                value = getattr(self, f"{key}_token_id")
                need(
                    value is None or (_is_int(value) and 0 <= value < self.vocab_size),
                    f"{key}_token_id must be None or an id below vocab_size {self.vocab_size}, got {value!r}",
                )
        activation = self.score_activation
        need(
            activation in SCORE_ACTIVATIONS,
            f"score_activation must be one of {', '.join(SCORE_ACTIVATIONS)}, got {activation!r}",
        )
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, key)
            none_is_right = key == "classifier_dropout" and value is None
            need(none_is_right or _is_number(value, 0, 1), f"{key} must lie in [0, 1), got {value!r}")
        blocks = self.critic_layers
        need(
            blocks is None or (_is_int(blocks) and blocks >= 0),
            f"critic_layers must be None or an integer of at least 0, got {blocks!r}",
        )
        eps, std = self.layer_norm_eps, self.initializer_range
        need(_is_number(eps) and eps > 0, f"layer_norm_eps must be a positive number, got {eps!r}")
        need(
            std is None or (_is_number(std) and std > 0),
            f"initializer_range must be None or positive, got {std!r}",
        )
        if problems:
            raise ValueError("LtgBertConfig: " + "; ".join(problems))

    @classmethod
    def _refuse_unknown(cls, kwargs: dict) -> None:
        known = _inherited_keys()
        own = [name for name in cls.__init__.__annotations__ if name != "return"]
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, [*own, *known], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(own)}"
                raise ValueError(f"LtgBertConfig: unknown key {key!r}{hint}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value, least: float = -math.inf, below: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < below


LtgBertConfig.register_for_auto_class()

__all__ = ["LtgBertConfig"]
