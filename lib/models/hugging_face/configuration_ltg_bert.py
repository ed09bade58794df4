"""Configuration of LTG-BERT.

See `shared_configuration.py` for how a saved folder comes to carry this file.
"""

from transformers import PreTrainedConfig

from .shared_configuration import SCORE_ACTIVATIONS, ConfigProblems, refuse_unknown_keys

SIZES = {  # as published; everything else is equal
    "xs": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048},
}


# trf-ignore: TRF010  (check() refuses more than types, all problems at once)
class LtgBertConfig(PreTrainedConfig):
    """Shape and behaviour of an `LtgBert*` model; the defaults are the published base model.

    Args:
        vocab_size: number of token ids.
        hidden_size: size D of the residual stream, divisible by `num_attention_heads`.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads per block.
        intermediate_size: inner width of the gated feed-forward layer.
        max_position_embeddings: distance at which the logarithmic buckets end. Longer inputs are allowed: all greater
            distances share the last bucket. They do not occur in training.
        position_bucket_size: relative positions have 2 * position_bucket_size - 1 buckets, exact up to half of it.
        layer_norm_eps: added to the variance in every layer norm.
        hidden_dropout_prob: dropout of embeddings, relative positions and of each block's two outputs.
        attention_probs_dropout_prob: dropout of attention weights.
        classifier_dropout: dropout before the last layer of the classifiers; None means `hidden_dropout_prob`.
        initializer_range: standard deviation of the initial matrices; None means sqrt(2 / (5 D)) (Nguyen & Salazar
            2019). The values are cut at two standard deviations.
        tie_word_embeddings: the last layer of the language-model head is the embedding matrix.
        critic_layers: None for no critic head; n >= 0 for n transformer blocks and two heads with one output. Not
            part of the published model.
        score_activation: "none", or "sigmoid" for a sequence head with one label whose score lies in [0, 1].
        unk_token_id, cls_token_id, sep_token_id, pad_token_id, mask_token_id: special ids, each inside the vocabulary
            or None. The defaults are those of the published tokenizer script.
        bos_token_id, eos_token_id: not used by the model; kept for tokenizers.

    Raises:
        ValueError: an unknown key (the message names the nearest right one), or values that no model can be built from.
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
        refuse_unknown_keys(
            LtgBertConfig, kwargs, extra=frozenset({"use_cache"})
        )  # Trainer sets it on any model
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
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raise one ValueError that lists all values that no model can be built from."""
        problems = ConfigProblems(self)
        problems.integers(
            vocab_size=1,
            hidden_size=1,
            num_hidden_layers=0,
            num_attention_heads=1,
            intermediate_size=1,
            max_position_embeddings=2,
            position_bucket_size=2,
        )
        if not problems.messages:
            problems.heads_divide()
            buckets, longest = self.position_bucket_size, self.max_position_embeddings
            problems.need(
                longest - 1 > buckets // 2,
                f"max_position_embeddings {longest} must exceed half of position_bucket_size {buckets} by 2 at least",
            )
            problems.token_ids("unk", "cls", "sep", "pad", "mask")
        problems.choice("score_activation", SCORE_ACTIVATIONS)
        problems.probabilities("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        problems.critic_layers()
        problems.positive("layer_norm_eps")
        problems.initializer_range()
        problems.raise_if_any()


LtgBertConfig.register_for_auto_class()

__all__ = ["LtgBertConfig"]
