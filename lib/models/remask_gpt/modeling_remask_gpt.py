"""The Remask GPT backbone and its heads, in the style of transformers.

One backbone (`RemaskGptModel`) serves every mode: rotary positions, RMSNorm without parameters before each half block,
normalised queries and keys, squared ReLU, output projections that start at zero, tied embeddings. The mode is the
head class on top of it. The model knows token ids and nothing else: which ids may be predicted, which positions are
masked and what a label means is decided by its callers.

Shapes in comments: B batch, T tokens, S tokens including cached ones, D width, H heads, V vocabulary, N chosen rows.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_remask_gpt import RemaskGptConfig

IGNORED = -100
# The linter of transformers asks which published checkpoints take each side of a branch. These keys choose modes.
# trf-ignore: TRF041 is_causal, score_activation, critic_layers, pooling, dropout
FEWEST_ROWS = (
    16  # rows, and outputs, of a product on the CPU below which its last bits depend on their number
)
ELEMENTS_IN_CACHE = 2**19  # size of the slices that CPU code works on: 1 MB in bfloat16
MAX_SLICED_LENGTH = 1024  # beyond, one sequence's attention weights no longer fit the cache
EMBEDDING_STD = 0.02
HEAD_STD = 0.02  # small first weights: a new head starts close to "no opinion"


def _is_tracing() -> bool:
    """Whether torch.export or torch.compile reads the code: then no check may look at a value."""
    return torch.compiler.is_compiling()


def _takes_native_code(tensor: Tensor) -> bool:
    """Whether torch's own kernels are right: what is written out here for the CPU's cache is slow elsewhere."""
    return tensor.device.type != "cpu" or _is_tracing()


def _may_look_at(tensor: Tensor) -> bool:
    """Whether reading a value of the tensor is cheap: on an accelerator it would stop the queue."""
    return tensor.device.type == "cpu" and not _is_tracing()


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a block
# ---------------------------------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    """`rms_norm` with the derivative written out: half the passes over memory of the composed one."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)  # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        return _rms_norm_gradient(grads[0], y, scale), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, kept as 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.to(torch.promote_types(x.dtype, torch.float32))
    return norm.square().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def _rms_norm_gradient(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Derivative of y = x * scale(x): scale * (grad - y * mean(grad * y))."""
    along = (grad * y).mean(dim=-1, keepdim=True)
    return torch.addcmul(grad, y, along, value=-1).mul_(scale)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square (Zhang & Sennrich 2019), without parameters."""
    if _takes_native_code(x):
        return F.rms_norm(x, (x.shape[-1],), eps=eps)
    return _RmsNorm.apply(x, eps)  # pyright: ignore[reportReturnType]


class _SquaredRelu(torch.autograd.Function):
    """`squared_relu` that keeps its input only, a slice at a time: what is made of a slice stays in the cache."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, out_rows = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        for part in _slices(rows.shape[0], rows.shape[1]):
            positive = rows[part].clamp_min(0)
            torch.mul(positive, positive, out=out_rows[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        out = grad_x.view(-1, x.shape[-1])
        for part in _slices(rows.shape[0], rows.shape[1]):
            twice = rows[part].clamp_min(0).mul_(2)
            torch.mul(twice, grad[part], out=out[part])
        return grad_x


def _slices(count: int, width: int) -> list[slice]:
    """Cut `count` items of `width` elements each into runs that fit the processor's second-level cache."""
    step = max(1, ELEMENTS_IN_CACHE // max(width, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared (So et al. 2021)."""
    return F.relu(x).square() if _takes_native_code(x) else _SquaredRelu.apply(x)  # pyright: ignore[reportReturnType]


def rotary_tables(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotary angles (Su et al. 2021).

    Computed at each call from the positions alone: there is no buffer that a half-precision cast could round or a
    loader forget. Angles are taken in double precision, so that a value does not depend on its place in the tensor.

    Args:
        position_ids: (T,) or (B, T) integer positions.

    Returns:
        cos, sin: (1, T, head_dim / 2) or (B, 1, T, head_dim / 2) of `dtype`, to go with heads (B, H, T, head_dim).
    """
    exact = torch.float32 if position_ids.device.type == "mps" else torch.float64
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=exact) / head_dim
    angles = (position_ids.to(exact)[..., None] * theta**-exponent).unsqueeze(-3)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of x (..., T, head_dim) as one complex number per pair by the angles; written to `out`."""
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def split_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, T, D / H) out of one projection (B, T, 3 D).

    Queries and keys are normalised (Henry et al. 2020) and rotated by their positions (Su et al. 2021).
    """
    batch, length, width = qkv.shape
    parts = qkv.view(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    first, second = rms_norm(parts[:2], eps).chunk(2, dim=-1)
    query, key = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).unbind()
    return query, key, parts[2]


class _SlicedAttention(torch.autograd.Function):
    """From the projection (B, T, 3 D) to the mixed heads (B, T, D), a few sequences at a time.

    The same as `split_heads` and `eager_attention`. The fused kernel of the CPU goes backward in bfloat16 many times
    slower than plain products; plain products of a whole batch are bound by memory. Here the weights of a slice
    never leave the cache and are computed again on the way back.
    """

    @staticmethod
    def forward(
        ctx, qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, num_heads: int, eps: float
    ) -> Tensor:
        batch, length, width = qkv.shape
        parts = qkv.view(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
        query_key = torch.empty_like(parts[:2], memory_format=torch.contiguous_format)  # (2, B, H, T, D / H)
        scale = query_key.new_empty((*query_key.shape[:-1], 1))
        out = qkv.new_empty(batch, length, num_heads, query_key.shape[-1])
        for rows in _slices(batch, num_heads * length * length):
            raw, done, part_scale = parts[:2, rows], query_key[:, rows], scale[:, rows]
            part_scale.copy_(_inverse_rms(raw, eps))
            # A rotation keeps the norm, so the scale may come last.
            _rotate_into(done, raw, _of_rows(cos, rows), _of_rows(sin, rows)).mul_(part_scale)
            query, key, value = _flat(done[0]), _flat(done[1]), _flat(parts[2, rows])
            weights = _attention_weights(
                query, key, None if bias is None else _of_rows(bias, rows), num_heads
            )
            mixed = torch.bmm(weights, value).view(-1, num_heads, length, value.shape[-1])
            out[rows].transpose(1, 2).copy_(mixed)
        ctx.save_for_backward(qkv, query_key, scale, cos, sin, bias)
        return out.view(batch, length, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        qkv, query_key, scale, cos, sin, bias = ctx.saved_tensors
        _, batch, num_heads, length, head_dim = query_key.shape
        values = qkv.view(batch, length, 3, num_heads, head_dim)[:, :, 2].transpose(1, 2)  # (B, H, T, D / H)
        grad_out = grads[0].reshape(batch, length, num_heads, head_dim).transpose(1, 2)
        grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        slots = grad_qkv.view(batch, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        for rows in _slices(batch, num_heads * length * length):
            shape = (-1, num_heads, length, head_dim)
            query, key, value, grad = (_flat(x[rows]) for x in (*query_key, values, grad_out))
            weights = _attention_weights(
                query, key, None if bias is None else _of_rows(bias, rows), num_heads
            )
            slots[2, rows].copy_(torch.bmm(weights.transpose(1, 2), grad).view(shape))
            grad_weights = torch.bmm(grad, value.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            pair = (torch.bmm(grad_scores, key), torch.bmm(grad_scores.transpose(1, 2), query))
            back = (_of_rows(cos, rows), -_of_rows(sin, rows))
            for index, grad_rotated in enumerate(pair):
                rotated, part_scale = query_key[index, rows], scale[index, rows]
                grad_rotated = grad_rotated.mul_(head_dim**-0.5).view(shape)
                _rotate_into(slots[index, rows], _rms_norm_gradient(grad_rotated, rotated, part_scale), *back)
        return grad_qkv, None, None, None, None, None


def _of_rows(x: Tensor, rows: slice) -> Tensor:
    """The rows of a tensor that has one per sequence; a tensor shared by all as it is."""
    return x if x.shape[0] == 1 else x[rows]


def _flat(x: Tensor) -> Tensor:
    """(B, H, T, D / H) to (B * H, T, D / H)."""
    return x.reshape(-1, *x.shape[2:])


def _attention_weights(query: Tensor, key: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """Attention weights (B * H, T, S) of flat heads; bias (1 or B, 1 or H, 1 or T, S) is added to the scores."""
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    if bias is not None:
        scores.view(-1, num_heads, *scores.shape[1:]).add_(bias)
    return torch.softmax(scores, dim=-1)


def sliced_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, is_causal: bool, num_heads: int, eps: float
) -> Tensor:
    """Attention (B, T, D) of one projection (B, T, 3 D) on the CPU; see `_SlicedAttention`."""
    if is_causal:
        mask = torch.ones(1, 1, qkv.shape[1], qkv.shape[1], dtype=torch.bool, device=qkv.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=qkv.dtype, device=qkv.device).masked_fill_(~mask, -math.inf)
    elif mask is not None:
        mask = mask.to(qkv.dtype)
    return _SlicedAttention.apply(qkv, cos, sin, mask, num_heads, eps)  # pyright: ignore[reportReturnType]


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on rows (N, D) whose bits do not depend on N.

    On the CPU few rows, or few outputs, take code that adds in an order chosen by N: both are padded with zeros.
    """
    if _takes_native_code(x):
        return F.linear(x, weight, bias)
    rows, outputs = x.shape[0], weight.shape[0]
    if rows < FEWEST_ROWS:
        x = F.pad(x, (0, 0, 0, FEWEST_ROWS - rows))
    if outputs < FEWEST_ROWS:
        weight = F.pad(weight, (0, 0, 0, FEWEST_ROWS - outputs))
        product = F.linear(x, weight)[:rows, :outputs]
        return product if bias is None else product + bias
    return F.linear(x, weight, bias)[:rows]


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention written out, for its weights. All (B, H, T or S, D / H); returns the same and weights (B, H, T, S)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, H, T, S)
    if is_causal:
        length = scores.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1)  # sums in float32 whatever the dtype
    return weights @ value, weights


def make_linear(wide_in: int, wide_out: int, bias: bool, initial_std: float) -> nn.Linear:
    """A linear layer with its own initial standard deviation.

    The layer carries it because transformers initialises module by module, and passes over those of custom code
    that hold no parameter themselves: a block could not correct its layers afterwards.
    """
    layer = nn.Linear(wide_in, wide_out, bias=bias)
    layer.initial_std = initial_std  # pyright: ignore[reportArgumentType]
    return layer


class RemaskGptAttention(nn.Module):
    """Multi-head self-attention with rotary positions and normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, config: RemaskGptConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        # A block that adds nothing at first keeps the residual stream as it is at any depth (Zhang et al. 2019).
        self.o_proj = make_linear(config.hidden_size, config.hidden_size, config.bias, initial_std=0.0)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_causal: bool,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, width = hidden.shape
        qkv = self.qkv_proj(hidden)  # (B, T, 3 D)
        cos, sin = (table.to(qkv.dtype) for table in rotary)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        eager = attend is eager_attention
        weights = None
        if self._may_slice(qkv) and past_key_values is None and not eager:
            mixed = sliced_attention(qkv, cos, sin, mask, is_causal, self.num_heads, self.eps)
            return self.o_proj(mixed), None
        query, key, value = split_heads(qkv, cos, sin, self.num_heads, self.eps)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if eager:
            mixed, weights = eager_attention(query, key, value, mask, is_causal)
        else:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(query.dtype)
            mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width)), weights

    def _may_slice(self, qkv: Tensor) -> bool:
        """Whether the CPU's own way applies: not on an accelerator, not while exporting, not for very long inputs."""
        return not _takes_native_code(qkv) and qkv.shape[1] <= MAX_SLICED_LENGTH


class RemaskGptMLP(nn.Module):
    """Two linear layers around a squared ReLU (So et al. 2021)."""

    def __init__(self, config: RemaskGptConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = make_linear(
            config.intermediate_size, config.hidden_size, config.bias, initial_std=0.0
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(squared_relu(self.up_proj(hidden)))


class RemaskGptLayer(GradientCheckpointingLayer):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: RemaskGptConfig, layer_idx: int):
        super().__init__()
        self.attn = RemaskGptAttention(config, layer_idx)
        self.mlp = RemaskGptMLP(config)
        self.eps = config.rms_norm_eps
        self.dropout = config.dropout

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attn(rms_norm(hidden, self.eps), rotary, mask, is_causal, past_key_values)
        hidden = hidden + self._drop(mixed)
        return hidden + self._drop(self.mlp(rms_norm(hidden, self.eps))), weights

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, training=True) if self.training and self.dropout else x


# ---------------------------------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------------------------------


class RemaskGptPreTrainedModel(PreTrainedModel):
    """What all Remask GPT classes share: initialisation and what transformers asks to know."""

    config: RemaskGptConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = RemaskGptConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RemaskGptLayer"]
    _supports_sdpa = True
    # The losses here are means over labelled positions of the batch at hand; Trainer then averages them itself.
    accepts_loss_kwargs = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Yes: attention reads the config at every call. transformers would guess from words in this file."""
        return True

    # trf-ignore: TRF018  (every parameter is filled here; two fillings would draw twice)
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the module's own parameters. There are no buffers in this model."""
        given, own = self.config.initializer_range, getattr(module, "initial_std", None)
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            return
        usual = EMBEDDING_STD if isinstance(module, nn.Embedding) else module.in_features**-0.5
        std = own if own is not None else given or usual
        if std:
            init.normal_(module.weight, std=std)
        else:
            init.zeros_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)

    def _pick_mask(
        self, attention_mask: Tensor | None, batch: int, length: int, past: int, like: Tensor
    ) -> tuple[Tensor | None, bool]:
        """Turn what the caller gave into what attention takes.

        Args:
            attention_mask: None; (B, S) with 1 for real tokens; or (B or 1, H or 1, T, S), boolean or 0/1 integers
                (True: may attend) or float (added to the scores). A 4-D mask is used as it is, also by a causal model.

        Returns:
            The mask (boolean or float, 4-D) or None, and whether plain causal attention is wanted. A query that may
            attend to nothing attends to everything instead: its output means nothing, but it is a number.
        """
        total = past + length
        if attention_mask is None:
            if not self.config.is_causal or length == 1:
                return None, False
            if past == 0:
                return None, True
            attention_mask = torch.ones(batch, total, dtype=torch.bool, device=like.device)
        if attention_mask.dim() == 2:
            if attention_mask.shape != (batch, total):
                raise ValueError(
                    f"attention_mask is {tuple(attention_mask.shape)}, expected {(batch, total)}"
                )
            mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
            if self.config.is_causal and length > 1:
                rows = torch.arange(past, total, device=like.device)[:, None]
                mask = mask & (rows >= torch.arange(total, device=like.device))  # (B, 1, T, S)
        elif attention_mask.dim() == 4:
            if attention_mask.shape[-1] != total or attention_mask.shape[-2] not in (1, length):
                shape = tuple(attention_mask.shape)
                raise ValueError(f"attention_mask is {shape}, expected ({batch}, 1, {length}, {total})")
            mask = attention_mask if attention_mask.is_floating_point() else attention_mask.bool()
        else:
            raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {tuple(attention_mask.shape)}")
        if mask.dtype == torch.bool:
            return mask | ~mask.any(dim=-1, keepdim=True), False
        nothing = mask.amax(dim=-1, keepdim=True) == -math.inf
        return mask.masked_fill(nothing, 0.0).to(like.dtype), False

    def _pick_positions(
        self, position_ids: Tensor | None, length: int, past: int, device: torch.device
    ) -> Tensor:
        """Positions (T,) or (B, T), refused beyond what the model was made for."""
        limit = self.config.max_position_embeddings
        highest = past + length - 1
        if position_ids is not None:
            if not _may_look_at(position_ids) or position_ids.numel() == 0:
                return position_ids
            highest = int(position_ids.max())
        if highest >= limit:
            raise ValueError(
                f"position {highest} is beyond this model's {limit} positions (config.max_position_embeddings); "
                "shorten the input or train a model with more"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=device)
        return position_ids


class RemaskGptModel(RemaskGptPreTrainedModel):
    """The backbone: token ids to normalised hidden states."""

    def __init__(self, config: RemaskGptConfig):
        config.check()  # values may have been set after the config was made
        super().__init__(config)
        # No padding_idx: it would freeze a row that resizing and tying treat like any other.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [RemaskGptLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput | BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, D), what `embed_tokens` would have given.
            attention_mask: (B, S), 1 for real tokens, or (B, 1, T, S) boolean or additive; see `_pick_mask`.
            position_ids: (T,) or (B, T); None counts from the end of the cache.
            output_hidden_states, output_attentions: return them too (attentions: eager only); None asks the config.
            past_key_values, use_cache: keys and values of earlier tokens, causal models only. None returns a cache
                in evaluation mode when the config says so.

        Returns:
            `last_hidden_state` (B, T, D) after the final norm; `hidden_states`, when asked, are the normalised
            embeddings, every block's output, and in the last place `last_hidden_state`.

        Raises:
            ValueError: ids outside the vocabulary, too long inputs, masks of a wrong shape.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        elif input_ids is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        batch, length, _ = inputs_embeds.shape
        past_key_values = self._pick_cache(past_key_values, use_cache)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        config = self.config
        want_attentions, want_hidden = (
            getattr(config, key) if kwargs.get(key) is None else kwargs[key]
            for key in ("output_attentions", "output_hidden_states")
        )

        hidden = rms_norm(inputs_embeds, config.rms_norm_eps)  # (B, T, D)
        if self.training and config.dropout:
            hidden = F.dropout(hidden, config.dropout)
        mask, is_causal = self._pick_mask(attention_mask, batch, length, past, hidden)
        positions = self._pick_positions(position_ids, length, past, hidden.device)
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta, hidden.dtype)

        all_hidden, all_attentions = [hidden], []
        for layer in self.layers if length else ():  # an empty text has nothing to attend to
            hidden, weights = layer(hidden, rotary, mask, is_causal, past_key_values=past_key_values)
            if want_attentions and weights is None:
                raise ValueError('output_attentions needs attn_implementation="eager"')
            all_hidden.append(hidden)
            all_attentions.append(weights)
        hidden = rms_norm(hidden, config.rms_norm_eps)
        all_hidden[-1] = hidden

        collected = {
            "last_hidden_state": hidden,
            "hidden_states": tuple(all_hidden) if want_hidden else None,
            "attentions": tuple(all_attentions) if want_attentions else None,
        }
        if not config.is_causal:
            return BaseModelOutput(**collected)
        return BaseModelOutputWithPast(past_key_values=past_key_values, **collected)

    def _pick_cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        if not self.config.is_causal:
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "a bidirectional model has no key/value cache: every token sees the later ones"
                )
            return None
        if past_key_values is None and use_cache is None:
            use_cache = self.config.use_cache and not self.training and not _is_tracing()
        if past_key_values is None and use_cache and not (self.training and self.is_gradient_checkpointing):
            return DynamicCache(config=self.config)
        return past_key_values

    def _embed(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids.is_floating_point() and not input_ids.numel():
            input_ids = input_ids.long()  # what tokenizers make of an empty text
        size = self.embed_tokens.num_embeddings
        if _may_look_at(input_ids) and input_ids.numel():
            low, high = (int(value) for value in input_ids.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids"
                )
        return self.embed_tokens(input_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and rows
# ---------------------------------------------------------------------------------------------------------------------


def _rows_at(hidden: Tensor, where: Tensor) -> Tensor:
    """Rows (N, D) of hidden (B, T, D) at flat indices (N,) into B * T."""
    if where.dim() != 1 or where.is_floating_point() or where.dtype == torch.bool:
        raise ValueError(
            f"logits_at must be a 1-D integer tensor of flat positions, got {where.dtype} {where.shape}"
        )
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)


def _refuse_classes_outside(labels: Tensor, num_classes: int) -> None:
    if _may_look_at(labels) and labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"label {low if low < 0 else high} is not one of the {num_classes} classes (or {IGNORED})"
            )


def _labelled(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Flat indices (N,) of the positions that have a label, and these labels, (N,) hard or (N, C) soft.

    Hard labels are integers of any shape, soft ones floats with the classes last. Ignored are hard labels of -100
    and soft rows that begin with -100 or are all zero.
    """
    if labels.is_floating_point():
        if labels.shape[-1] != num_classes:
            shape = tuple(labels.shape)
            raise ValueError(
                f"float labels are soft targets with {num_classes} classes last, got shape {shape}"
            )
        rows = labels.reshape(-1, num_classes)
        counts = (rows[:, 0] != IGNORED) & (rows != 0).any(dim=-1)
    else:
        rows = labels.reshape(-1)
        counts = rows != IGNORED
    where = counts.nonzero().squeeze(-1)
    if not _is_tracing() and where.numel() == 0:
        raise ValueError(f"no position has a label: all {counts.numel()} are ignored ({IGNORED})")
    rows = rows.index_select(0, where)
    if not labels.is_floating_point():
        _refuse_classes_outside(rows, num_classes)
    return where, rows


def _class_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (N, C) against hard (N,) or soft (N, C) targets, in float32 at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    if targets.is_floating_point():
        targets = targets.to(exact)
    return F.cross_entropy(logits.to(exact), targets)


def _error_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats of log-odds (N,) against targets (N,) in [0, 1]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(logits.to(exact), targets.to(exact))


def _loss_at_labels(
    hidden: Tensor,
    labels: Tensor,
    num_classes: int,
    logits_at: Tensor | str | None,
    score: Callable,
    loss_of: Callable,
) -> tuple[Tensor, Tensor]:
    """Logits and loss, both only where needed.

    `score` maps rows (N, D) to logits. With `logits_at=None` the logits are those of all positions; the loss reads
    the labelled rows of them. With "labels" they are computed at labelled positions only. With a tensor, `labels`
    has one entry per chosen position, or one per position of the batch.
    """
    batch, length, width = hidden.shape
    per_position = labels.shape[0] == batch and labels.dim() > 1
    if isinstance(logits_at, Tensor):
        if per_position:
            labels = labels.flatten(0, 1).index_select(0, logits_at)
        if labels.shape[0] != logits_at.shape[0]:
            raise ValueError(f"{labels.shape[0]} labels for {logits_at.shape[0]} positions of logits_at")
        logits = score(_rows_at(hidden, logits_at))
        where, targets = _labelled(labels, num_classes)
        return logits, loss_of(logits.index_select(0, where), targets)
    if labels.shape[:2] != (batch, length):
        raise ValueError(f"labels are {tuple(labels.shape)}, expected to begin with {(batch, length)}")
    where, targets = _labelled(labels, num_classes)
    if logits_at == "labels":
        logits = score(_rows_at(hidden, where))
        return logits, loss_of(logits, targets)
    logits = score(hidden.reshape(-1, width))
    loss = loss_of(logits.index_select(0, where), targets)
    return logits.view(batch, length, *logits.shape[1:]), loss


class _LanguageModelHead(RemaskGptPreTrainedModel):
    """What the masked and the causal language model share: a head tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model: RemaskGptModel
    lm_head: nn.Linear

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def lm_logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D) as the backbone returns them; bits do not depend on N."""
        logits = linear_rows(hidden_rows, self.lm_head.weight, self.lm_head.bias)  # (N, V)
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


# ---------------------------------------------------------------------------------------------------------------------
# Masked language model, with an optional critic
# ---------------------------------------------------------------------------------------------------------------------


class RemaskGptCritic(nn.Module):
    """Blocks of its own and two linear layers: is each token an error, and did a generator write it?

    The two differ: a rare word that a person wrote is seldom what a generator would put there, and yet no generator's.
    """

    def __init__(self, config: RemaskGptConfig):
        super().__init__()
        blocks = config.critic_layers or 0
        self.layers = nn.ModuleList([RemaskGptLayer(config, index) for index in range(blocks)])
        self.score = make_linear(config.hidden_size, 1, bias=True, initial_std=HEAD_STD)
        self.origin = make_linear(config.hidden_size, 1, bias=True, initial_std=HEAD_STD)
        # Added to the embeddings of tokens known to be right; one that never learned what that means makes no difference
        self.given = nn.Embedding(1, config.hidden_size)
        self.given.initial_std = 0.0  # pyright: ignore[reportArgumentType]
        self.eps = config.rms_norm_eps

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Hidden states (B, T, D) of the backbone to normalised states (B, T, D) that `score` and `origin` read."""
        for layer in self.layers:
            hidden, _ = layer(hidden, rotary, mask)
        return rms_norm(hidden, self.eps) if len(self.layers) else hidden

    def score_rows(self, rows: Tensor) -> Tensor:
        """Log-odds (N,) of an error, of rows (N, D)."""
        return linear_rows(rows, self.score.weight, self.score.bias).squeeze(-1)

    def origin_logits(self, states: Tensor) -> Tensor:
        """Log-odds (B, T) that a generator wrote the token, of states (B, T, D)."""
        rows = linear_rows(states.flatten(0, 1), self.origin.weight, self.origin.bias)
        return rows.view(states.shape[:2])


@dataclass
class RemaskGptMaskedLMOutput(MaskedLMOutput):
    """`critic_logits` (B, T): log-odds that each token is an error, with `head="both"`. `origin_logits` (B, T): that a
    generator wrote it, with "both" and "critic"."""

    critic_logits: Tensor | None = None
    origin_logits: Tensor | None = None


class RemaskGptForMaskedLM(_LanguageModelHead):
    """Bidirectional language model that fills masks; `head="critic"` finds errors instead."""

    def __init__(self, config: RemaskGptConfig):
        if config.is_causal:
            raise ValueError('RemaskGptForMaskedLM needs attention="bidirectional", the config says "causal"')
        super().__init__(config)
        self.model = RemaskGptModel(config)
        std = config.initializer_range or EMBEDDING_STD
        self.lm_head = make_linear(config.hidden_size, config.vocab_size, config.bias, initial_std=std)
        self.critic = RemaskGptCritic(config) if config.critic_layers is not None else None
        self.post_init()

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
        given: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Logits over the vocabulary, or log-odds that a token is an error.

        Args:
            labels: for `head="lm"` (B, T) ids with -100 for ignored positions, or soft targets (B, T, V); for
                `head="critic"` (B, T), 1 for an error, 0 for none, -100 for ignored. The loss is the mean over
                labelled positions, in nats.
            logits_at: compute logits only at these flat positions (N,) of the B * T; "labels" means the labelled
                ones. Labels may then also be given per chosen position, (N,) or (N, V).
            head: "lm", "critic" (needs `config.critic_layers`), or "both" in one pass: as "lm", and `critic_logits`; with the
                critic also `origin_logits`.
            given: for `head="critic"`, (B, T) bool, True for tokens that are known to be right, such as a prompt's.
                None: nothing is known.

        Returns:
            `logits` (B, T, V) or (N, V) for "lm", (B, T) or (N,) for "critic".
        """
        if head not in ("lm", "critic", "both"):
            raise ValueError(f'head must be "lm", "critic" or "both", got {head!r}')
        if given is not None:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.model._embed(input_ids), None
            inputs_embeds = self._with_given(inputs_embeds, given, head)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        critic_logits = origin_logits = None
        if head != "lm":
            states, critic = self._critic_hidden(hidden, attention_mask, position_ids), self._require_critic()
            origin_logits = critic.origin_logits(states)
            if head == "both":
                critic_logits = critic.score_rows(states.flatten(0, 1)).view(states.shape[:2])
        if head == "critic":
            hidden = states
            score, loss_of, num_classes = self._require_critic().score_rows, _error_loss, 2
            if labels is not None and labels.is_floating_point():
                labels = labels.long()
        else:
            score, loss_of, num_classes = self.lm_logits, _class_loss, self.config.vocab_size
        loss = None
        if labels is not None:
            logits, loss = _loss_at_labels(hidden, labels, num_classes, logits_at, score, loss_of)
        elif isinstance(logits_at, str):
            raise ValueError("logits_at as a word needs labels")
        elif logits_at is not None:
            logits = score(_rows_at(hidden, logits_at))
        else:
            logits = score(hidden.flatten(0, 1))
            logits = logits.view(*hidden.shape[:2], *logits.shape[1:])
        return RemaskGptMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            critic_logits=critic_logits,
            origin_logits=origin_logits,
        )  # pyright: ignore[reportArgumentType]

    def _with_given(self, embeddings: Tensor, given: Tensor, head: str) -> Tensor:
        """Embeddings (B, T, D) that say which tokens (B, T) are known to be right."""
        if head != "critic":
            raise ValueError(f'given is for head="critic", not for {head!r}')
        mark = self._require_critic().given.weight  # (1, D)
        return embeddings + given[..., None].to(mark.dtype) * mark

    def _critic_hidden(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        batch, length, _ = hidden.shape
        mask, _ = self._pick_mask(attention_mask, batch, length, 0, hidden)
        positions = self._pick_positions(position_ids, length, 0, hidden.device)
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        return self._require_critic()(hidden, rotary, mask)

    def _require_critic(self) -> RemaskGptCritic:
        if self.critic is None:
            raise ValueError("this model has no critic head: set critic_layers (0 or more) in its config")
        return self.critic


# ---------------------------------------------------------------------------------------------------------------------
# Causal language model
# ---------------------------------------------------------------------------------------------------------------------


class RemaskGptForCausalLM(_LanguageModelHead, GenerationMixin):
    """Ordinary left-to-right language model, with `generate`."""

    def __init__(self, config: RemaskGptConfig):
        if not config.is_causal:
            raise ValueError('RemaskGptForCausalLM needs attention="causal", the config says "bidirectional"')
        super().__init__(config)
        self.model = RemaskGptModel(config)
        std = config.initializer_range or EMBEDDING_STD
        self.lm_head = make_linear(config.hidden_size, config.vocab_size, config.bias, initial_std=std)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        logits_at: Tensor | str | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position.

        Args:
            labels: (B, T) ids, usually the `input_ids`; shifted inside, so position t is compared with label t + 1.
                -100 is ignored. Loss: mean over the labelled positions, in nats.
            logits_to_keep: only the last so many positions, or the positions of a 1-D tensor; 0 keeps all.
            logits_at: only these flat positions (N,) of the B * T; "labels" means those whose next token is
                labelled. Not together with `logits_to_keep`.

        Returns:
            `logits` (B, T, V), (B, kept, V) or (N, V), `past_key_values` when a cache is used.
        """
        keep_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if logits_at is not None and not keep_all:
            raise ValueError("give logits_at or logits_to_keep, not both")
        if labels is not None and use_cache is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if not keep_all:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        loss = None
        if labels is not None:
            if not keep_all:
                raise ValueError(
                    "labels need every position's logits: leave logits_to_keep at 0 or use logits_at"
                )
            targets = F.pad(
                labels[:, 1:], (0, 1), value=IGNORED
            )  # (B, T): the last position has nothing to predict
            logits, loss = _loss_at_labels(
                hidden, targets, self.config.vocab_size, logits_at, self.lm_logits, _class_loss
            )
        elif isinstance(logits_at, str):
            raise ValueError("logits_at as a word needs labels")
        elif logits_at is not None:
            logits = self.lm_logits(_rows_at(hidden, logits_at))
        else:
            logits = self.lm_logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers
# ---------------------------------------------------------------------------------------------------------------------


def _classifier_dropout(config: RemaskGptConfig) -> nn.Dropout:
    return nn.Dropout(config.dropout if config.classifier_dropout is None else config.classifier_dropout)


class RemaskGptForTokenClassification(RemaskGptPreTrainedModel):
    """A class for every token."""

    def __init__(self, config: RemaskGptConfig):
        super().__init__(config)
        if (config.num_labels or 0) < 2:
            raise ValueError(f"token classification needs num_labels of at least 2, got {config.num_labels}")
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self.model = RemaskGptModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = make_linear(config.hidden_size, self.num_labels, bias=True, initial_std=HEAD_STD)
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
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{"use_cache": False if self.config.is_causal else None, **kwargs},
        )
        hidden = self.dropout(outputs.last_hidden_state)
        if labels is None:
            logits, loss = self._score(hidden.flatten(0, 1)).view(*hidden.shape[:2], self.num_labels), None
        else:
            logits, loss = _loss_at_labels(hidden, labels, self.num_labels, None, self._score, _class_loss)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )  # pyright: ignore[reportArgumentType]

    def _score(self, rows: Tensor) -> Tensor:
        return linear_rows(rows, self.classifier.weight, self.classifier.bias)


class RemaskGptForSequenceClassification(RemaskGptPreTrainedModel):
    """A class, several labels, a number, or a score in [0, 1] for the whole sequence."""

    def __init__(self, config: RemaskGptConfig):
        if config.score_activation == "sigmoid" and config.num_labels != 1:
            raise ValueError(f'score_activation="sigmoid" needs num_labels=1, got {config.num_labels}')
        if config.score_activation == "sigmoid" and config.problem_type is None:
            # Said in this model's own copy, else the text-classification pipeline puts a second sigmoid on the score.
            config = copy.copy(config)
            config.problem_type = "regression"
        super().__init__(config)
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self.model = RemaskGptModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = make_linear(config.hidden_size, self.num_labels, bias=True, initial_std=HEAD_STD)
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
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{"use_cache": False if self.config.is_causal else None, **kwargs},
        )
        pooled = self._pool(outputs.last_hidden_state, input_ids, attention_mask)  # (B, D)
        logits = linear_rows(
            self.dropout(pooled), self.classifier.weight, self.classifier.bias
        )  # (B, num_labels)
        if self.config.score_activation == "sigmoid":
            logits = logits.sigmoid()
        loss = self._loss(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )  # pyright: ignore[reportArgumentType]

    def _pool(self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """One row per sequence (B, D), counted among its real tokens whichever side the padding is on."""
        pooling = self.config.pooling or ("last" if self.config.is_causal else "first")
        batch, length, _ = hidden.shape
        real = None
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask.bool()
        elif attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        if pooling == "mean":
            weights = real.to(hidden.dtype).unsqueeze(-1)  # (B, T, 1)
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        place = torch.arange(length, device=hidden.device)
        if pooling == "first":
            index = torch.where(real, place, length - 1).amin(dim=-1)
        else:
            index = torch.where(real, place, 0).amax(dim=-1)
        return hidden[torch.arange(batch, device=hidden.device), index]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type or self._infer_problem(labels)
        batch, exact = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
        if problem == "single_label_classification":
            if self.num_labels < 2:
                raise ValueError(f"{problem} needs num_labels of at least 2 to tell labels apart, got 1")
            if labels.is_floating_point() or labels.shape != (batch,):
                shape = tuple(labels.shape)
                raise ValueError(
                    f"{problem} takes integer labels of shape ({batch},), got {labels.dtype} {shape}"
                )
            _refuse_classes_outside(labels, self.num_labels)
            return _class_loss(logits, labels)
        if labels.numel() != logits.numel() or labels.shape[0] != batch:
            raise ValueError(
                f"{problem} takes labels of shape {tuple(logits.shape)}, got {tuple(labels.shape)}"
            )
        targets = labels.to(exact).view_as(logits)
        if problem == "multi_label_classification":
            self._refuse_outside_unit(targets, problem)
            return F.binary_cross_entropy_with_logits(logits.to(exact), targets)
        if self.config.score_activation == "sigmoid":
            self._refuse_outside_unit(targets, "a score in [0, 1]")
        elif _may_look_at(targets) and not bool(targets.isfinite().all()):
            raise ValueError("regression labels hold NaN or infinity")
        return F.mse_loss(logits.to(exact), targets)

    def _infer_problem(self, labels: Tensor) -> str:
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    @staticmethod
    def _refuse_outside_unit(targets: Tensor, what: str) -> None:
        if _may_look_at(targets) and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"labels of {what} must lie in [0, 1]")


RemaskGptModel.register_for_auto_class("AutoModel")
RemaskGptForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
RemaskGptForCausalLM.register_for_auto_class("AutoModelForCausalLM")
RemaskGptForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
RemaskGptForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "RemaskGptForCausalLM",
    "RemaskGptForMaskedLM",
    "RemaskGptForSequenceClassification",
    "RemaskGptForTokenClassification",
    "RemaskGptModel",
    "RemaskGptPreTrainedModel",
]
