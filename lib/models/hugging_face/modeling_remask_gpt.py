"""The Remask GPT backbone and its heads, in the style of transformers.

One backbone (`RemaskGptModel`) serves every mode, and the mode is the head class on top of it. The backbone has rotary
positions, RMSNorm without parameters before attention and before the MLP, normalised queries and keys, and squared ReLU.
Output projections start at zero, and embeddings are tied. The caller decides which ids may be predicted, which positions are
masked, and what a label means.

On the CPU, some functions have their own derivatives and work on slices that fit the cache. Elsewhere torch's kernels run.

Shapes in comments: B batch, T tokens, S tokens including cached ones, D hidden size, H heads, V vocabulary, N chosen rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_remask_gpt import RemaskGptConfig
from .shared_configuration import require_token_classes, sequence_config
from .shared_modeling import (
    IGNORED,
    MaskedLMOutputWithCritic,
    TokenHead,
    add_conditioning,
    check_head,
    check_positions,
    class_loss,
    embed_tokens,
    error_loss,
    expand_mask,
    is_compiling_for_cpu,
    is_tracing,
    may_read,
    rows_at,
    sequence_logits,
    sequence_loss,
    token_outputs,
    unblock_empty_rows,
)

# The linter of transformers asks which published checkpoints take each side of a branch. These keys choose modes.
# trf-ignore: TRF041 is_causal, score_activation, critic_layers, pooling, dropout
MIN_ROWS = 16  # with fewer rows or outputs, the last bits of a product on the CPU depend on their number
ELEMENTS_IN_CACHE = 2**19  # size of the slices that CPU code works on: 1 MB in bfloat16
KEPT_WEIGHTS = 2**22  # attention weights of a batch that are kept for the backward pass: 8 MB in bfloat16
MAX_SLICED_LENGTH = 1024  # attention weights of one longer sequence do not fit the cache
EMBEDDING_STD = 0.02
HEAD_STD = 0.02  # a new head starts close to equal probabilities


def _use_native_kernels(tensor: Tensor) -> bool:
    """Whether to call torch's own kernels. What is written out here for the cache of a CPU is slow elsewhere."""
    return tensor.device.type != "cpu" or is_tracing()


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a block
# ---------------------------------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    """`rms_norm` with its own derivative, which reads memory half as often as the composed one."""

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
    if _use_native_kernels(x):
        return F.rms_norm(x, (x.shape[-1],), eps=eps)
    return _RmsNorm.apply(x, eps)  # pyright: ignore[reportReturnType]


class _SquaredRelu(torch.autograd.Function):
    """`squared_relu` that saves its input only and works on slices, whose intermediate results stay in the cache."""

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
    """Divide `count` items of `width` elements into slices that fit the processor's second-level cache."""
    step = max(1, ELEMENTS_IN_CACHE // max(width, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared (So et al. 2021)."""
    return F.relu(x).square() if _use_native_kernels(x) else _SquaredRelu.apply(x)  # pyright: ignore[reportReturnType]


def rotary_tables(
    position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotary angles (Su et al. 2021).

    Computed at each call from the positions alone. There is no buffer that a half-precision cast could round, or that
    loading could miss. Double precision makes a value independent of its index in the tensor.

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
    """Rotate x (..., T, head_dim) by the angles into `out`. An element and its partner in the other half form a pair.

    The partners are copied first, since arithmetic on half rows takes a CPU three times as long as a copy and arithmetic on
    whole ones.
    """
    half = x.shape[-1] // 2
    partners = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    torch.mul(x, torch.cat((cos, cos), dim=-1), out=out)
    return out.addcmul_(partners, torch.cat((-sin, sin), dim=-1))


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

    Equal to `split_heads` and `eager_attention`. In bfloat16 the CPU's fused kernel has a backward pass that is many times
    slower than plain products. Plain products of a whole batch are bound by memory. Here the weights of a slice stay in
    the cache. The backward pass reads them again if they are few, and computes them again otherwise.
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
        few = batch * num_heads * length * length <= KEPT_WEIGHTS
        kept: list[Tensor] = []
        for rows in _slices(batch, num_heads * length * length):
            raw, done, part_scale = parts[:2, rows], query_key[:, rows], scale[:, rows]
            part_scale.copy_(_inverse_rms(raw, eps))
            # A rotation keeps the norm, so the scale can be applied last.
            _rotate_into(done, raw, _of_rows(cos, rows), _of_rows(sin, rows)).mul_(part_scale)
            query, key, value = _flat(done[0]), _flat(done[1]), _flat(parts[2, rows])
            weights = _attention_weights(
                query, key, None if bias is None else _of_rows(bias, rows), num_heads
            )
            mixed = torch.bmm(weights, value).view(-1, num_heads, length, value.shape[-1])
            out[rows].transpose(1, 2).copy_(mixed)
            if few:
                kept.append(weights)
        ctx.save_for_backward(qkv, query_key, scale, cos, sin, bias, *kept)
        return out.view(batch, length, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        qkv, query_key, scale, cos, sin, bias, *kept = ctx.saved_tensors
        _, batch, num_heads, length, head_dim = query_key.shape
        values = qkv.view(batch, length, 3, num_heads, head_dim)[:, :, 2].transpose(1, 2)  # (B, H, T, D / H)
        grad_out = grads[0].reshape(batch, length, num_heads, head_dim).transpose(1, 2)
        grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        slots = grad_qkv.view(batch, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        for number, rows in enumerate(_slices(batch, num_heads * length * length)):
            shape = (-1, num_heads, length, head_dim)
            query, key, value, grad = (_flat(x[rows]) for x in (*query_key, values, grad_out))
            if kept:
                weights = kept[number]
            else:
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
    """These rows of a tensor with one row per sequence. A tensor with one row for all is returned as it is."""
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


def _sliced_attention(
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

    With few rows or few outputs, CPU kernels add in an order that depends on N. So both are padded with zeros.
    """
    if _use_native_kernels(x):
        return F.linear(x, weight, bias)
    rows, outputs = x.shape[0], weight.shape[0]
    if rows < MIN_ROWS:
        x = F.pad(x, (0, 0, 0, MIN_ROWS - rows))
    if outputs < MIN_ROWS:
        weight = F.pad(weight, (0, 0, 0, MIN_ROWS - outputs))
        product = F.linear(x, weight)[:rows, :outputs]
        return product if bias is None else product + bias
    return F.linear(x, weight, bias)[:rows]


def _enough_rows(rows: Tensor) -> Tensor:
    """Flat positions (N,), repeated at the end where they are fewer than `MIN_ROWS`: see `linear_rows`."""
    missing = MIN_ROWS - rows.shape[0]
    return F.pad(rows, (0, missing)) if missing > 0 else rows


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

    The layer carries it because transformers initialises module by module, and skips modules of custom code that hold
    no parameter themselves. A block cannot change its layers afterwards.
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
        # A block adds nothing at first, so the residual stream has the same scale at any depth (Zhang et al. 2019).
        self.o_proj = make_linear(config.hidden_size, config.hidden_size, config.bias, initial_std=0.0)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_causal: bool,
        past_key_values: Cache | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values (B, T, D), or (N, D) of the flat positions `rows`; attention weights if the kernel gives them."""
        batch, length, width = hidden.shape
        qkv = self.qkv_proj(hidden)  # (B, T, 3 D)
        cos, sin = (table.to(qkv.dtype) for table in rotary)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        # Compiled code for a CPU is fastest with plain products; torch fuses what is between them
        eager = attend is eager_attention or (is_compiling_for_cpu(qkv) and length <= MAX_SLICED_LENGTH)
        weights = None
        if self._may_slice(qkv) and past_key_values is None and not eager:
            mixed = _sliced_attention(qkv, cos, sin, mask, is_causal, self.num_heads, self.eps)
            return self.o_proj(mixed if rows is None else rows_at(mixed, rows)), None
        query, key, value = split_heads(qkv, cos, sin, self.num_heads, self.eps)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if eager:
            mixed, weights = eager_attention(query, key, value, mask, is_causal)
            weights = weights if attend is eager_attention else None
        else:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(query.dtype)
            mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return self.o_proj(mixed if rows is None else rows_at(mixed, rows)), weights

    def _may_slice(self, qkv: Tensor) -> bool:
        """Whether `_sliced_attention` applies: on a CPU, not while exporting, not for very long inputs."""
        return not _use_native_kernels(qkv) and qkv.shape[1] <= MAX_SLICED_LENGTH


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


class RemaskGptConvolution(nn.Module):
    """Adds to every embedding a linear function of its neighbours': features of short strings, before the first block.

    Attention has to learn which token is the next one. A convolution has it from the first step. Byte-level models add such
    features by hashing (Pagnoni et al. 2024). The weights start at zero, so a new model is as one without them.
    """

    def __init__(self, config: RemaskGptConfig):
        super().__init__()
        self.width = config.conv_width
        self.is_causal = config.is_causal
        self.num_layers = config.num_hidden_layers
        size = config.hidden_size
        self.linear = make_linear(self.width * size, size, bias=False, initial_std=0.0)

    def forward(self, hidden: Tensor, mask: Tensor | None, past_key_values: Cache | None = None) -> Tensor:
        """(B, T, D) to the same. `mask`: None or (B, S), 1 for real tokens; others are no neighbours.

        A bidirectional model reads as many embeddings before a token as after it. A causal one reads the `width` - 1 before it. The
        cache keeps those of earlier tokens as one more layer, so what transformers does to a cache happens to them as well.
        """
        length = hidden.shape[1]
        near = hidden if mask is None else hidden * (mask[:, -length:] != 0).to(hidden.dtype)[..., None]
        before = self.width - 1 if self.is_causal else self.width // 2
        if past_key_values is not None:
            near = self._with_earlier(near, past_key_values)[:, -(length + before) :]
        near = F.pad(near, (0, 0, length + before - near.shape[1], self.width - 1 - before))
        return hidden + self.linear(torch.cat([near[:, k : k + length] for k in range(self.width)], dim=-1))

    def _with_earlier(self, near: Tensor, past_key_values: Cache) -> Tensor:
        """The embeddings (B, S, D) of all tokens up to these, which the cache keeps after the last layer."""
        if (
            past_key_values.layer_class_to_replicate is None
            and len(past_key_values.layers) == self.num_layers
        ):
            past_key_values.layers.append(DynamicLayer())  # a cache that was made for this config
        no_values = near[:, None, :, :0]
        return past_key_values.update(near[:, None], no_values, self.num_layers)[0][:, 0]


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
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, D) after the block, or (N, D) of the flat positions `rows`; and attention weights."""
        mixed, weights = self.attn(rms_norm(hidden, self.eps), rotary, mask, is_causal, past_key_values, rows)
        hidden = (hidden if rows is None else rows_at(hidden, rows)) + self._drop(mixed)
        return hidden + self._drop(self.mlp(rms_norm(hidden, self.eps))), weights

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, training=True) if self.training and self.dropout else x


# ---------------------------------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------------------------------


class RemaskGptPreTrainedModel(PreTrainedModel):
    """Base class of all Remask GPT models: initialisation and settings for transformers."""

    config: RemaskGptConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = RemaskGptConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RemaskGptLayer"]
    _supports_sdpa = True
    # The losses are means over the labelled positions of a batch. Trainer averages them over batches.
    accepts_loss_kwargs = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True, since attention reads the config at every call. transformers would guess from the text of this file."""
        return True

    # trf-ignore: TRF018  (every parameter is filled here; two fillings would draw twice)
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the module's own parameters. There are no buffers in this model."""
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            return
        default_std = EMBEDDING_STD if isinstance(module, nn.Embedding) else module.in_features**-0.5
        module_std = getattr(module, "initial_std", None)
        std = module_std if module_std is not None else self.config.initializer_range or default_std
        if std:
            init.normal_(module.weight, std=std)
        else:
            init.zeros_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)

    def _pick_mask(
        self, attention_mask: Tensor | None, batch: int, length: int, past: int, like: Tensor
    ) -> tuple[Tensor | None, bool]:
        """The mask for attention, from the caller's.

        Args:
            attention_mask: None; (B, S) with 1 for real tokens; or (B or 1, H or 1, T, S), boolean or 0/1 integers
                (True: may attend) or float (added to the scores). A 4-D mask is used as it is, also by a causal model.

        Returns:
            The mask (boolean or float, 4-D) or None, and whether attention is plainly causal. See
            `shared_modeling.unblock_empty_rows` for queries without a key.
        """
        total = past + length
        if attention_mask is None:
            if not self.config.is_causal or length == 1:
                return None, False
            if past == 0:
                return None, True
            attention_mask = torch.ones(batch, total, dtype=torch.bool, device=like.device)
        mask = expand_mask(attention_mask, batch, length, total)
        if attention_mask.dim() == 2 and self.config.is_causal and length > 1:
            queries = torch.arange(past, total, device=like.device)[:, None]
            mask = mask & (queries >= torch.arange(total, device=like.device))  # (B, 1, T, S)
        return unblock_empty_rows(mask, like.dtype), False

    def _pick_positions(
        self, position_ids: Tensor | None, batch: int, length: int, past: int, device: torch.device
    ) -> Tensor:
        """Positions (T,) or (B, T). Raises ValueError for another shape, or beyond `max_position_embeddings`."""
        limit = self.config.max_position_embeddings
        highest = past + length - 1
        if position_ids is not None:
            check_positions(position_ids, batch, length)
            if not may_read(position_ids) or position_ids.numel() == 0:
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
        # No padding_idx: it would freeze a row, while resizing and tying treat all rows alike.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # CODEPATH: checkpoints trained with architecture.conv_width have the convolution; the others have none.
        self.conv = RemaskGptConvolution(config) if config.conv_width else None
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
        states_at: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput | BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: (B, T) token ids; or their embeddings as `inputs_embeds` (B, T, D).
            attention_mask: (B, S), 1 for real tokens, or (B, 1, T, S) boolean or additive; see `_pick_mask`.
            position_ids: (T,) or (B, T); None counts from the end of the cache.
            output_hidden_states, output_attentions: return them too (attentions: eager only); None asks the config.
            past_key_values, use_cache: keys and values of earlier tokens, causal models only. None returns a cache
                in evaluation mode when the config says so.
            states_at: flat positions (N,) of the B * T, the only ones whose states are needed. The last block computes
                nothing but keys and values for the others, which saves most of its time.

        Returns:
            `last_hidden_state` (B, T, D) after the final norm, or (N, D) with `states_at`. `hidden_states`, when asked for,
            are the first block's input and every block's output; the last one is `last_hidden_state`.

        Raises:
            ValueError: ids outside the vocabulary, too long inputs, masks or positions of a wrong shape, a static cache, a
                mask (B, 1, T, S) with `conv_width`.
        """
        if inputs_embeds is None:
            inputs_embeds = embed_tokens(input_ids, self.embed_tokens)
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
        mask, is_causal = self._pick_mask(attention_mask, batch, length, past, hidden)
        if self.conv is not None:
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError(
                    f"a model with conv_width {config.conv_width} takes a mask (B, T), which says who the neighbours of a token "
                    f"are; got {attention_mask.dim()} dimensions"
                )
            hidden = self.conv(hidden, attention_mask, past_key_values)
        if self.training and config.dropout:
            hidden = F.dropout(hidden, config.dropout)
        positions = self._pick_positions(position_ids, batch, length, past, hidden.device)
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta, hidden.dtype)

        all_hidden, all_attentions = [hidden], []
        rows = None if states_at is None or want_hidden else _enough_rows(states_at)
        for layer in self.layers if length else ():  # an empty text skips attention
            needed = {"rows": rows} if rows is not None and layer is self.layers[-1] else {}
            hidden, weights = layer(
                hidden, rotary, mask, is_causal, past_key_values=past_key_values, **needed
            )
            if want_attentions and weights is None:
                raise ValueError('output_attentions needs attn_implementation="eager"')
            all_hidden.append(hidden)
            all_attentions.append(weights)
        hidden = rms_norm(hidden, config.rms_norm_eps)
        all_hidden[-1] = hidden
        if states_at is not None:  # all states are there if the caller wants them, or if the text is empty
            hidden = hidden[: states_at.shape[0]] if hidden.dim() == 2 else rows_at(hidden, states_at)

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
        if isinstance(past_key_values, StaticCache):
            raise ValueError(
                "a static key/value cache is not supported: leave cache_implementation out, or give a DynamicCache"
            )
        if past_key_values is None and use_cache is None:
            use_cache = self.config.use_cache and not self.training and not is_tracing()
        if past_key_values is None and use_cache and not (self.training and self.is_gradient_checkpointing):
            return DynamicCache(config=self.config)
        return past_key_values


# ---------------------------------------------------------------------------------------------------------------------
# Language models
# ---------------------------------------------------------------------------------------------------------------------


class _LanguageModelHead(RemaskGptPreTrainedModel):
    """Base class of the masked and the causal language model: a head tied to the embeddings."""

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


class RemaskGptCritic(nn.Module):
    """Additional blocks and two linear layers: is each token an error, and did a generator sample it?

    The answers differ. A generator would seldom sample a rare word that a person wrote, yet the word is no error.
    """

    def __init__(self, config: RemaskGptConfig):
        super().__init__()
        blocks = config.critic_layers or 0
        self.layers = nn.ModuleList([RemaskGptLayer(config, index) for index in range(blocks)])
        self.score = make_linear(config.hidden_size, 1, bias=True, initial_std=HEAD_STD)
        self.origin = make_linear(config.hidden_size, 1, bias=True, initial_std=HEAD_STD)
        # Added to the embeddings of tokens in the conditioning mask. The name is part of saved weights. It starts at zero,
        # so an untrained vector changes nothing.
        self.given = nn.Embedding(1, config.hidden_size)
        self.given.initial_std = 0.0  # pyright: ignore[reportArgumentType]
        self.eps = config.rms_norm_eps

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Normalised states (B, T, D) for `score` and `origin`, from the backbone's hidden states (B, T, D)."""
        for layer in self.layers if hidden.shape[1] else ():  # an empty text skips attention
            hidden, _ = layer(hidden, rotary, mask)
        return rms_norm(hidden, self.eps) if len(self.layers) else hidden

    def score_rows(self, rows: Tensor) -> Tensor:
        """Log-odds (N,) of an error, of rows (N, D)."""
        return linear_rows(rows, self.score.weight, self.score.bias).squeeze(-1)

    def origin_logits(self, states: Tensor) -> Tensor:
        """Log-odds (B, T) that a generator sampled the token, of states (B, T, D)."""
        rows = linear_rows(states.flatten(0, 1), self.origin.weight, self.origin.bias)
        return rows.view(states.shape[:2])


class RemaskGptForMaskedLM(_LanguageModelHead):
    """Bidirectional masked language model, with an optional critic."""

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
        conditioning_mask: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutputWithCritic:
        """Logits over the vocabulary, or log-odds that a token is an error.

        Args:
            labels: for `head="lm"` (B, T) ids with -100 for ignored positions, or soft targets (B, T, V); for
                `head="critic"` (B, T), 1 for an error, 0 for none, -100 for ignored. The loss is the mean over
                labelled positions, in nats.
            logits_at: compute logits only at these flat positions (N,) of the B * T; "labels" means the labelled
                ones. Labels may then also be given per chosen position, (N,) or (N, V).
            head: "lm"; "critic", which needs `config.critic_layers`; or "both" in one forward pass, which gives "lm" and
                `critic_logits`. With the critic the output has `origin_logits`, too.
            conditioning_mask: for `head="critic"`, (B, T) bool. True for tokens that are known to be right, such as
                a prompt's. None: nothing is known.

        Returns:
            `logits` (B, T, V) or (N, V) for "lm", (B, T) or (N,) for "critic".
        """
        check_head(head, self.critic is not None, conditioning_mask)
        # 1. Embeddings; the critic may be conditioned on tokens that are known to be right.
        if conditioning_mask is not None and self.critic is not None:
            if inputs_embeds is None:
                inputs_embeds, input_ids = embed_tokens(input_ids, self.model.embed_tokens), None
            inputs_embeds = add_conditioning(inputs_embeds, conditioning_mask, self.critic.given.weight)
        # 2. The backbone; if only some logits are wanted, its last block computes only those states
        only_rows = isinstance(logits_at, Tensor) and head == "lm" and labels is None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            states_at=logits_at if only_rows else None,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, T, D) or (N, D)
        if only_rows:
            return MaskedLMOutputWithCritic(
                logits=self.lm_logits(hidden),
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )  # pyright: ignore[reportArgumentType]
        token_head = TokenHead(self.lm_logits, class_loss, self.config.vocab_size)
        # 3. The critic's layers and its two heads
        critic_logits = origin_logits = None
        if self.critic is not None and head != "lm":
            states = self._critic_states(self.critic, hidden, attention_mask, position_ids)
            origin_logits = self.critic.origin_logits(states)
            if head == "both":
                critic_logits = self.critic.score_rows(states.flatten(0, 1)).view(states.shape[:2])
            else:
                hidden, token_head = states, TokenHead(self.critic.score_rows, error_loss, 2)
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

    def _critic_states(
        self,
        critic: RemaskGptCritic,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """The critic's states (B, T, D) of the backbone's hidden states (B, T, D)."""
        batch, length, _ = hidden.shape
        mask, _ = self._pick_mask(attention_mask, batch, length, 0, hidden)
        positions = self._pick_positions(position_ids, batch, length, 0, hidden.device)
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        return critic(hidden, rotary, mask)


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
            logits_to_keep: only the last n positions, or the positions of a 1-D tensor; 0 keeps all.
            logits_at: only these flat positions (N,) of the B * T. "labels": those whose next token has a label. Not
                together with `logits_to_keep`.

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
        targets = None
        if labels is not None:
            if not keep_all:
                raise ValueError(
                    "labels need every position's logits: leave logits_to_keep at 0 or use logits_at"
                )
            targets = F.pad(
                labels[:, 1:], (0, 1), value=IGNORED
            )  # (B, T): the last position predicts nothing
        token_head = TokenHead(self.lm_logits, class_loss, self.config.vocab_size)
        logits, loss = token_outputs(hidden, targets, logits_at, token_head)
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
        self.num_labels = require_token_classes(config)
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
        logits, loss = token_outputs(
            hidden, labels, None, TokenHead(self._score, class_loss, self.num_labels)
        )
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )  # pyright: ignore[reportArgumentType]

    def _score(self, rows: Tensor) -> Tensor:
        return linear_rows(rows, self.classifier.weight, self.classifier.bias)


class RemaskGptForSequenceClassification(RemaskGptPreTrainedModel):
    """A class, several labels, a number, or a score in [0, 1] for the whole sequence."""

    def __init__(self, config: RemaskGptConfig):
        config = sequence_config(config)
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
        shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]  # pyright: ignore[reportOptionalMemberAccess]
        real = self._real_tokens(input_ids, attention_mask, shape)
        pooled_at = self._pooled_positions(real)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            states_at=pooled_at,
            **{"use_cache": False if self.config.is_causal else None, **kwargs},
        )
        pooled = outputs.last_hidden_state  # (B, D)
        if pooled_at is None:
            weights = real.to(pooled.dtype).unsqueeze(-1)  # (B, T, 1)
            pooled = (pooled * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        dtype = self.classifier.weight.dtype
        logits = sequence_logits(self._score, pooled, dtype, self.config)  # (B, num_labels)
        loss = None if labels is None else sequence_loss(logits, labels, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )  # pyright: ignore[reportArgumentType]

    def _score(self, pooled: Tensor) -> Tensor:
        """(B, num_labels) of pooled states (B, D)."""
        return linear_rows(self.dropout(pooled), self.classifier.weight, self.classifier.bias)

    def _real_tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """(B, T) bool, False for padding, which may be on either side."""
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask.bool()
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        return torch.ones(shape, dtype=torch.bool, device=self.device)

    def _pooled_positions(self, real: Tensor) -> Tensor | None:
        """(B,) flat positions whose states stand for the sequences; None for the mean of all real tokens."""
        pooling = self.config.pooling or ("last" if self.config.is_causal else "first")
        if pooling == "mean":
            return None
        batch, length = real.shape
        position = torch.arange(length, device=real.device)
        if pooling == "first":
            index = torch.where(real, position, length - 1).amin(dim=-1)
        else:
            index = torch.where(real, position, 0).amax(dim=-1)
        return torch.arange(batch, device=real.device) * length + index


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
