"""Configuration of the Remask GPT backbone.

See `shared_configuration.py` for how a saved folder comes to carry this file.
"""

from transformers import PreTrainedConfig

from .shared_configuration import SCORE_ACTIVATIONS, ConfigProblems, is_number, refuse_unknown_keys

ATTENTION_TYPES = ("bidirectional", "causal")
POOLINGS = ("first", "last", "mean")
MAX_CONV_WIDTH = 255


# trf-ignore: TRF010  (check() refuses more than types, all problems at once)
class RemaskGptConfig(PreTrainedConfig):
    """Shape and behaviour of a `RemaskGpt*` model.

    Args:
        vocab_size: number of token ids.
        hidden_size: size D of the residual stream; divisible by `num_attention_heads`, with an even quotient.
        num_hidden_layers: transformer blocks of the backbone.
        num_attention_heads: attention heads per block.
        intermediate_size: width of the MLP; None means four times `hidden_size`.
        max_position_embeddings: largest number of positions. Positions are rotary, so no weight depends on it. Longer
            inputs are refused, because such distances do not occur in training.
        attention: "bidirectional" (masked LM, classifiers) or "causal" (ordinary language model).
        dropout: probability of dropping an element of the embeddings and of each block's two outputs.
        bias: whether the linear layers of the blocks and the language-model head have biases.
        conv_width: number of neighbouring embeddings, the token's own included, that a convolution before the first block
            reads; an odd number, or 0 for no convolution. A causal model reads the token and those before it.
        rope_theta: base of the rotary frequencies.
        initializer_range: standard deviation of the initial matrices; None means 1/sqrt(fan-in), and 0.02 for the
            embeddings. Output projections of the blocks start at zero in any case.
        logit_softcap: logits become cap * tanh(logits / cap); 0: off.
        rms_norm_eps: added to the mean square before the root.
        tie_word_embeddings: the language-model head is the embedding matrix.
        use_cache: causal models return the key/value cache in evaluation mode.
        pad_token_id, mask_token_id, cls_token_id, unk_token_id: special ids, each inside the vocabulary or None.
        bos_token_id, eos_token_id, sep_token_id: not used by the model; kept for `generate` and tokenizers.
        critic_layers: None for no critic head; n >= 0 for n transformer blocks and two linear layers with one output.
        score_activation: "none", or "sigmoid" for a sequence head with one label whose score lies in [0, 1].
        classifier_dropout: dropout before the head of the two classifiers; None means `dropout`.
        pooling: the state that the sequence head reads: that of the "first" or "last" real token, or the "mean". None
            means first for bidirectional models and last for causal ones.

    Raises:
        ValueError: an unknown key (the message names the nearest right one), or values that no model can be built from.
    """

    model_type = "remask_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 70,
        hidden_size: int = 192,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 6,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 128,
        attention: str = "bidirectional",
        dropout: float = 0.0,
        bias: bool = False,
        conv_width: int = 0,
        rope_theta: float = 10000.0,
        initializer_range: float | None = None,
        logit_softcap: float = 0.0,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        mask_token_id: int | None = 1,
        cls_token_id: int | None = 2,
        unk_token_id: int | None = 3,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        sep_token_id: int | None = None,
        critic_layers: int | None = None,
        score_activation: str = "none",
        classifier_dropout: float | None = None,
        pooling: str | None = None,
        **kwargs,
    ):
        refuse_unknown_keys(RemaskGptConfig, kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.attention = attention
        self.dropout = dropout
        self.bias = bias
        self.conv_width = conv_width
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.logit_softcap = logit_softcap
        self.rms_norm_eps = rms_norm_eps
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        self.cls_token_id = cls_token_id
        self.unk_token_id = unk_token_id
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.sep_token_id = sep_token_id
        self.critic_layers = critic_layers
        self.score_activation = score_activation
        self.classifier_dropout = classifier_dropout
        self.pooling = pooling
        self.check()
        super().__init__(**kwargs)

    @property
    def is_causal(self) -> bool:
        """Whether a token attends only to itself and to earlier ones."""
        return self.attention == "causal"

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raise one ValueError that lists all values that no model can be built from."""
        problems = ConfigProblems(self)
        problems.integers(
            vocab_size=1,
            hidden_size=2,
            num_hidden_layers=0,
            num_attention_heads=1,
            intermediate_size=1,
            max_position_embeddings=1,
        )
        if not problems.messages:
            size, heads = self.hidden_size, self.num_attention_heads
            problems.need(
                not problems.heads_divide() or self.head_dim % 2 == 0,
                f"hidden_size {size} / num_attention_heads {heads} = {size // heads}: rotary needs it even",
            )
            problems.token_ids("pad", "mask", "cls", "unk")
        problems.integers(conv_width=0)
        if not problems.messages:
            width = self.conv_width
            problems.need(
                width == 0 or (width % 2 == 1 and width <= MAX_CONV_WIDTH),
                f"conv_width must be 0 or an odd number up to {MAX_CONV_WIDTH}, got {width}",
            )
        problems.choice("attention", ATTENTION_TYPES)
        problems.choice("score_activation", SCORE_ACTIVATIONS)
        problems.choice("pooling", (None, *POOLINGS))
        problems.probabilities("dropout", "classifier_dropout")
        problems.positive("rope_theta")
        problems.positive("rms_norm_eps")
        cap = self.logit_softcap
        problems.need(
            is_number(cap) and cap >= 0, f"logit_softcap must be a non-negative number, got {cap!r}"
        )
        problems.initializer_range()
        problems.critic_layers()
        problems.raise_if_any()


RemaskGptConfig.register_for_auto_class()

__all__ = ["RemaskGptConfig"]
