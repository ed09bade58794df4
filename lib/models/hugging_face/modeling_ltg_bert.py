"""LTG-BERT and its heads, in the style of transformers.

Samuel, Kutuzov, Øvrelid and Velldal 2023, "Trained on 100 million words and still in shape". Written from the paper and
checked against vectors of the reference implementation. Differences from BERT:

- Attention scores are the sum of content-content, content-position and position-content terms (DeBERTa, He et al. 2021).
  The positions are distances in logarithmic buckets.
- A layer norm without parameters stands before attention and before the feed-forward layer. Another follows attention, with
  parameters, and one lies inside the gated feed-forward layer (NormFormer, Shleifer et al. 2021).

Shapes in comments: B batch, T tokens, D hidden size, H heads, R relative-position buckets, V vocabulary, N chosen rows.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_ltg_bert import LtgBertConfig
from .shared_configuration import require_token_classes, sequence_config
from .shared_modeling import (
    MaskedLMOutputWithCritic,
    TokenHead,
    add_conditioning,
    check_head,
    check_positions,
    class_loss,
    embed_tokens,
    error_loss,
    expand_mask,
    sequence_logits,
    sequence_loss,
    token_outputs,
    unblock_empty_rows,
)

# The linter of transformers asks which published checkpoints take each side of a branch. These keys choose heads.
# trf-ignore: TRF041 score_activation, critic_layers
ROUNDING = 1e-9  # above the error of a quotient of logarithms in float64


# ---------------------------------------------------------------------------------------------------------------------
# Relative positions
# ---------------------------------------------------------------------------------------------------------------------


def bucket_of_distance(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """Row 0 .. 2 * buckets - 2 of the table of relative positions for signed distances.

    Exact up to half of `buckets`, then logarithmic, so that a distance of `longest` - 1 and all beyond share the last
    bucket of their sign.
    """
    middle = buckets // 2
    size = distance.abs().clamp(max=longest - 1)
    # At least `middle`: the logarithm of a shorter distance would be negative, and its bucket is exact anyway.
    far = size.clamp(min=middle).to(torch.float64)
    log_share = torch.log(far / middle) / math.log((longest - 1) / middle)
    # In float64 log(2) / log(8) * 15 is 5.000000000000001, which must not be rounded up to 6.
    bucket = torch.ceil(log_share * (middle - 1) - ROUNDING).to(distance.dtype) + middle
    return torch.where(size <= middle, distance, bucket * distance.sign()) + buckets - 1


def bucket_index(config: LtgBertConfig, positions: Tensor) -> Tensor:
    """Buckets (1 or B, T, T) of query position minus key position, for positions (T,) or (B, T)."""
    positions = positions if positions.dim() == 2 else positions.unsqueeze(0)
    distance = positions.unsqueeze(2) - positions.unsqueeze(1)  # (1 or B, T, T)
    longest = config.max_position_embeddings
    # Take the logarithm once per distance, not once per pair. MPS has no float64.
    device = torch.device("cpu") if positions.device.type == "mps" else positions.device
    every = torch.arange(1 - longest, longest, device=device)
    table = bucket_of_distance(every, config.position_bucket_size, longest).to(positions.device)
    return table[distance.clamp(1 - longest, longest - 1) + longest - 1]


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a block
# ---------------------------------------------------------------------------------------------------------------------


def plain_norm(width: int, eps: float) -> nn.LayerNorm:
    """Layer norm without parameters."""
    return nn.LayerNorm(width, eps=eps, elementwise_affine=False)


def scaled_linear(wide_in: int, wide_out: int, bias: bool, initial_scale: float) -> nn.Linear:
    """A linear layer whose initial matrix is multiplied by `initial_scale`.

    The layer carries the factor because transformers initialises module by module. A block cannot change its layers
    afterwards.
    """
    layer = nn.Linear(wide_in, wide_out, bias=bias)
    layer.initial_scale = initial_scale  # pyright: ignore[reportArgumentType]
    return layer


class LtgBertEmbedding(nn.Module):
    """Word embeddings, and the table of relative positions that all blocks share."""

    def __init__(self, config: LtgBertConfig):
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_layer_norm = plain_norm(config.hidden_size, config.layer_norm_eps)
        rows = 2 * config.position_bucket_size - 1
        self.relative_embedding = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.relative_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, word_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised words (B, T, D) and relative positions (R, D) of word embeddings (B, T, D)."""
        return self.dropout(self.word_layer_norm(word_embeddings)), self.relative_positions()

    def relative_positions(self) -> Tensor:
        """The normalised table (R, D)."""
        return self.relative_layer_norm(self.relative_embedding)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for its weights; the signature is that of transformers' attention functions.

    Queries, keys and values (B, H, T, D / H), attention_mask added to the scores; returns (B, T, H, D / H) and the
    weights (B, H, T, T) before dropout.
    """
    weights = torch.softmax((query * scaling) @ key.transpose(-1, -2) + attention_mask, dim=-1)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), weights


class LtgBertAttention(nn.Module):
    """Disentangled self-attention.

    The score of query i and key j is q_i k_j + q_i k'_r + q'_r k_j, divided by sqrt(3 D / H). Here r is the bucket of
    i - j, and q', k' are projections of the table of relative positions. Both position terms are products with the R
    rows of the table, (B, H, T, R). The pairs are gathered from them, so no tensor of size T x T x D is made.
    """

    def __init__(self, config: LtgBertConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        width = config.hidden_size
        self.pre_layer_norm = plain_norm(width, config.layer_norm_eps)
        self.in_proj_qk = nn.Linear(width, 2 * width)
        self.in_proj_v = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.post_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.scale = (3 * config.head_dim) ** -0.5

    def forward(
        self, hidden: Tensor, relative: Tensor, index: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) and, when eager, the weights (B, H, T, T).

        Args:
            relative: (R, D) table of relative positions.
            index: (1 or B, T, T) its row for every query and key.
            mask: (B or 1, H or 1, T or 1, T), boolean (True: may attend) or added to the scores.
        """
        batch, length, width = hidden.shape
        hidden = self.pre_layer_norm(hidden)
        query, key = (self._heads(part) for part in self.in_proj_qk(hidden).chunk(2, dim=-1))
        value = self._heads(self.in_proj_v(hidden))
        # The reference reads this projection head by head: query and key of the first head, then of the second. For
        # words it has all queries first. The published weights depend on this order.
        positions = self.in_proj_qk(self.dropout(relative)).view(-1, self.num_heads, 2 * self.head_dim)
        query_pos, key_pos = positions.transpose(0, 1).chunk(2, dim=-1)  # (H, R, D / H)
        bias = self._position_scores(query, key, query_pos, key_pos, index)
        if mask is not None:
            bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
        drop = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", _eager_attention
        )
        if torch.compiler.is_exporting():  # exporters fail on the strides of the decomposed fused kernel
            attend = _eager_attention
        mixed, weights = attend(self, query, key, value, bias, dropout=drop, scaling=self.scale)
        mixed = mixed.reshape(batch, length, width)
        return self.dropout(self.post_layer_norm(self.out_proj(mixed))), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, D / H)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _position_scores(
        self, query: Tensor, key: Tensor, query_pos: Tensor, key_pos: Tensor, index: Tensor
    ) -> Tensor:
        """The two position terms (B, H, T, T), scaled. Queries and keys (B, H, T, D / H), positions (H, R, D / H)."""
        shape = (*query.shape[:3], query.shape[2])
        index = index.unsqueeze(1)  # (1 or B, 1, T, T)
        of_query = (query * self.scale) @ key_pos.transpose(-1, -2)  # (B, H, T, R)
        of_key = (key * self.scale) @ query_pos.transpose(-1, -2)
        from_query = of_query.gather(-1, index.expand(shape))
        from_key = of_key.gather(-1, index.transpose(-1, -2).expand(shape))  # keys in rows
        return from_query + from_key.transpose(-1, -2)


class LtgBertFeedForward(nn.Module):
    """Gated feed-forward layer (GEGLU, Shazeer 2020) with a norm before and one inside."""

    def __init__(self, config: LtgBertConfig, depth: int):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        scale = (2 * (1 + depth)) ** -0.5  # deeper blocks start smaller
        self.pre_layer_norm = plain_norm(width, eps)
        self.up_proj = scaled_linear(width, 2 * inner, bias=False, initial_scale=scale)
        self.inner_layer_norm = plain_norm(inner, eps)
        self.down_proj = scaled_linear(inner, width, bias=False, initial_scale=scale)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        content, gate = self.up_proj(self.pre_layer_norm(hidden)).chunk(2, dim=-1)
        gated = content * F.gelu(gate, approximate="tanh")
        return self.dropout(self.down_proj(self.inner_layer_norm(gated)))


class LtgBertLayer(GradientCheckpointingLayer):
    """One transformer block: x + attention(x), then x + mlp(x). Both normalise their input."""

    def __init__(self, config: LtgBertConfig, depth: int):
        super().__init__()
        self.attention = LtgBertAttention(config)
        self.mlp = LtgBertFeedForward(config, depth)

    def forward(
        self, hidden: Tensor, relative: Tensor, index: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attention(hidden, relative, index, mask)
        hidden = hidden + mixed
        return hidden + self.mlp(hidden), weights


class LtgBertTransformer(nn.Module):
    """The blocks."""

    def __init__(self, config: LtgBertConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            [LtgBertLayer(config, depth) for depth in range(config.num_hidden_layers)]
        )


class LtgBertHead(nn.Module):
    """Norm, linear, GELU, norm, dropout, linear: the head of the language model and of both classifiers."""

    def __init__(self, config: LtgBertConfig, outputs: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.first_layer_norm = plain_norm(width, eps)
        self.dense = nn.Linear(width, width)
        self.second_layer_norm = plain_norm(width, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.decoder = nn.Linear(width, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., outputs) of rows (..., D)."""
        rows = F.gelu(self.dense(self.first_layer_norm(rows)))
        return self.decoder(self.dropout(self.second_layer_norm(rows)))


# ---------------------------------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------------------------------


class LtgBertPreTrainedModel(PreTrainedModel):
    """Base class of all LTG-BERT models: the backbone's two modules, initialisation, and settings for transformers.

    Every class holds `embedding` and `transformer` itself. So state dicts of two classes differ in the head only.
    """

    config: LtgBertConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = LtgBertConfig
    base_model_prefix = "ltg_bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LtgBertLayer"]
    _supports_sdpa = True
    # The losses are means over the labelled positions of a batch. Trainer averages them over batches.
    accepts_loss_kwargs = False

    def _make_backbone(self, config: LtgBertConfig) -> None:
        """The two modules that every class has; called after the constructor of transformers."""
        config.check()  # values may have been set after the config was made
        self.embedding = LtgBertEmbedding(config)
        self.transformer = LtgBertTransformer(config)
        self.gradient_checkpointing = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True, since attention reads the config at every call. transformers would guess from the text of this file."""
        return True

    # trf-ignore: TRF018  (every parameter is filled here; two fillings would draw twice)
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the module's own parameters. There are no buffers in this model."""
        std = self.config.initializer_range or math.sqrt(2 / (5 * self.config.hidden_size))
        if isinstance(module, nn.Linear):
            scaled = std * getattr(module, "initial_scale", 1.0)
            init.trunc_normal_(module.weight, std=scaled, a=-2 * scaled, b=2 * scaled)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, LtgBertEmbedding):
            init.trunc_normal_(module.relative_embedding, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embedding = value

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Run the backbone; the classes below add their head to this.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, D), what the word embedding would have given.
            attention_mask: (B, T), 1 for real tokens; or (B or 1, H or 1, T, T), boolean or 0/1 (1: may attend) or
                float, added to the scores. See `shared_modeling.unblock_empty_rows` for queries without a key.
            position_ids: (T,) or (B, T), any integers: only their differences matter. None counts from 0.

        Returns:
            `last_hidden_state` (B, T, D); `hidden_states`, when asked, the embeddings and every block's output;
            `attentions`, when asked (eager only), (B, H, T, T) per block.

        Raises:
            ValueError: ids outside the vocabulary, masks or positions of a wrong shape.
        """
        if inputs_embeds is None:
            inputs_embeds = embed_tokens(input_ids, self.embedding.word_embedding)
        elif input_ids is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        want_attentions = config.output_attentions if output_attentions is None else output_attentions
        want_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, relative = self.embedding(inputs_embeds)
        index, mask = self._pairs(attention_mask, position_ids, hidden)

        all_hidden, all_attentions = [hidden], []
        for layer in self.transformer.layers if hidden.shape[1] else ():  # an empty text skips attention
            hidden, weights = layer(hidden, relative, index, mask)
            all_hidden.append(hidden)
            if want_attentions and weights is None:
                raise ValueError('output_attentions needs attn_implementation="eager"')
            all_attentions.append(weights)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(all_hidden) if want_hidden else None,
            attentions=tuple(all_attentions) if want_attentions else None,
        )

    def _pairs(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments of every block's attention: buckets (1 or B, T, T), and the 4-D mask or None."""
        batch, length, _ = hidden.shape
        mask = None
        if attention_mask is not None:
            mask = unblock_empty_rows(expand_mask(attention_mask, batch, length, length), hidden.dtype)
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden.device)
        else:
            check_positions(position_ids, batch, length)
        return bucket_index(self.config, position_ids), mask


class LtgBertModel(LtgBertPreTrainedModel):
    """The backbone alone: token ids to hidden states."""

    def __init__(self, config: LtgBertConfig):
        super().__init__(config)
        self._make_backbone(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Hidden states (B, T, D); see `encode` for the arguments."""
        return self.encode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


class LtgBertCritic(nn.Module):
    """Additional blocks and two heads: is each token an error, and did a generator sample it?

    The published model has no critic.
    """

    def __init__(self, config: LtgBertConfig):
        super().__init__()
        first = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [LtgBertLayer(config, first + n) for n in range(config.critic_layers or 0)]
        )
        self.score = LtgBertHead(config, 1)
        self.origin = LtgBertHead(config, 1)
        # Added to the embeddings of tokens in the conditioning mask. The name is part of saved weights. It starts at zero,
        # so an untrained vector changes nothing.
        self.given = nn.Embedding(1, config.hidden_size)
        self.given.starts_at_zero = True  # pyright: ignore[reportArgumentType]

    def forward(self, hidden: Tensor, relative: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """States (B, T, D) for `score` and `origin`, from the backbone's hidden states (B, T, D)."""
        for layer in self.layers if hidden.shape[1] else ():  # an empty text skips attention
            hidden, _ = layer(hidden, relative, index, mask)
        return hidden

    def log_odds(self, rows: Tensor) -> Tensor:
        """Log-odds (...) of an error, of rows (..., D)."""
        return self.score(rows).squeeze(-1)


class LtgBertForMaskedLM(LtgBertPreTrainedModel):
    """LTG-BERT as a masked language model, with an optional critic. The last layer is tied to the word embedding."""

    _tied_weights_keys = {"lm_head.decoder.weight": "embedding.word_embedding.weight"}

    def __init__(self, config: LtgBertConfig):
        super().__init__(config)
        self._make_backbone(config)
        self.lm_head = LtgBertHead(config, config.vocab_size)
        self.critic = LtgBertCritic(config) if config.critic_layers is not None else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_at: Tensor | str | None = None,
        head: str = "lm",
        conditioning_mask: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutputWithCritic:
        """Logits over the vocabulary, or log-odds that a token is an error.

        Args:
            labels: for `head="lm"` (B, T) ids with -100 for ignored positions, or soft targets (B, T, V); for
                `head="critic"` (B, T), 1 for an error, 0 for none, -100 for ignored. The loss is the mean over
                labelled positions, in nats.
            logits_at: compute logits only at these flat positions (N,) of the B * T; "labels" means the labelled ones.
            head: "lm"; "critic", which needs `config.critic_layers`; or "both" in one forward pass, which gives "lm" and
                `critic_logits`. With the critic the output has `origin_logits`, too.
            conditioning_mask: for `head="critic"`, (B, T) bool. True for tokens that are known to be right, such as
                a prompt's. None: nothing is known.

        Returns:
            `logits` (B, T, V) or (N, V) for "lm", (B, T) or (N,) for "critic".

        Raises:
            ValueError: no position has a label, or a label is not in the vocabulary.
        """
        check_head(head, self.critic is not None, conditioning_mask)
        # 1. Embeddings; the critic may be conditioned on tokens that are known to be right.
        if conditioning_mask is not None and self.critic is not None:
            if inputs_embeds is None:
                inputs_embeds, input_ids = embed_tokens(input_ids, self.embedding.word_embedding), None
            inputs_embeds = add_conditioning(inputs_embeds, conditioning_mask, self.critic.given.weight)
        # 2. The backbone
        outputs = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        hidden = cast(Tensor, outputs.last_hidden_state)  # (B, T, D)
        token_head = TokenHead(self.lm_head, class_loss, self.config.vocab_size)
        # 3. The critic's layers and its two heads
        critic_logits = origin_logits = None
        if self.critic is not None and head != "lm":
            index, mask = self._pairs(attention_mask, position_ids, hidden)
            states = self.critic(hidden, self.embedding.relative_positions(), index, mask)
            origin_logits = self.critic.origin(states).squeeze(-1)
            if head == "both":
                critic_logits = self.critic.log_odds(states)
            else:
                hidden, token_head = states, TokenHead(self.critic.log_odds, error_loss, 2)
                labels = None if labels is None else labels.long()
        # 4. Logits and loss of the head that was asked for
        logits, loss = token_outputs(hidden, labels, logits_at, token_head)
        return MaskedLMOutputWithCritic(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            critic_logits=critic_logits,
            origin_logits=origin_logits,
        )  # pyright: ignore[reportArgumentType]


class LtgBertClassifierHead(LtgBertHead):
    """The head of a classifier, with `classifier_dropout` if the config has it."""

    def __init__(self, config: LtgBertConfig):
        super().__init__(config, config.num_labels or 1)
        if config.classifier_dropout is not None:
            self.dropout = nn.Dropout(config.classifier_dropout)


class LtgBertForTokenClassification(LtgBertPreTrainedModel):
    """A class for every token."""

    def __init__(self, config: LtgBertConfig):
        super().__init__(config)
        self._make_backbone(config)
        self.num_labels = require_token_classes(config)
        self.classifier = LtgBertClassifierHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Class logits (B, T, num_labels).

        Args:
            labels: (B, T) classes with -100 for ignored positions, or soft labels (B, T, num_labels); the loss is the
                mean cross-entropy over labelled positions, in nats.
        """
        outputs = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        hidden = cast(Tensor, outputs.last_hidden_state)
        logits, loss = token_outputs(
            hidden, labels, None, TokenHead(self.classifier, class_loss, self.num_labels)
        )
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )  # pyright: ignore[reportArgumentType]


class LtgBertForSequenceClassification(LtgBertPreTrainedModel):
    """A class, several labels, a number, or a score in [0, 1] for the whole sequence, from its first token's state."""

    def __init__(self, config: LtgBertConfig):
        config = sequence_config(config)
        super().__init__(config)
        self._make_backbone(config)
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self.classifier = LtgBertClassifierHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels), or scores (B, 1) in [0, 1] with `score_activation="sigmoid"`.

        Args:
            labels: regression: floats (B,) or (B, num_labels), mean squared error; one class: integers (B,),
                cross-entropy; several labels at once: floats 0 or 1 (B, num_labels), binary cross-entropy. Which of
                them is `config.problem_type`, else it follows from `num_labels` and the labels of this call.

        Raises:
            ValueError: labels whose type, shape or range contradicts the problem.
        """
        outputs = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        first = _first_real(cast(Tensor, outputs.last_hidden_state), attention_mask)  # (B, D)
        dtype = self.classifier.decoder.weight.dtype
        logits = sequence_logits(self.classifier, first, dtype, self.config)  # (B, num_labels)
        loss = None if labels is None else sequence_loss(logits, labels, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )  # pyright: ignore[reportArgumentType]


def _first_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states (B, D) of every sequence's first real token, whichever side the padding is on."""
    if attention_mask is None or attention_mask.dim() != 2:
        return hidden[:, 0]
    first = attention_mask.bool().to(torch.long).argmax(dim=-1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]


LtgBertModel.register_for_auto_class("AutoModel")
LtgBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LtgBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
LtgBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "LtgBertForMaskedLM",
    "LtgBertForSequenceClassification",
    "LtgBertForTokenClassification",
    "LtgBertModel",
    "LtgBertPreTrainedModel",
]
