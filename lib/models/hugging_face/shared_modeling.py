"""Inputs, labels and losses that the models of both families share. See `shared_configuration.py` for who copies this file.

Shapes in comments: B batch, T tokens, S tokens including cached ones, D hidden size, H heads, C classes, N chosen rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

IGNORED = -100  # the label of positions that have no loss
HEADS = ("lm", "critic", "both")


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def is_tracing() -> bool:
    """Whether torch.export or torch.compile traces the code. Then no check may read a value."""
    return torch.compiler.is_compiling()


def is_compiling_for_cpu(tensor: Tensor) -> bool:
    """Whether torch.compile traces the code for a CPU. An export may run anywhere."""
    return is_tracing() and not torch.compiler.is_exporting() and tensor.device.type == "cpu"


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read values of the tensor. On an accelerator that would wait for the queue; tracing forbids it."""
    return tensor.device.type == "cpu" and not is_tracing()


def embed_tokens(input_ids: Tensor | None, embedding: nn.Embedding) -> Tensor:
    """Embeddings (B, T, D) of token ids (B, T).

    Raises:
        ValueError: no ids, or ids outside the vocabulary.
    """
    if input_ids is None:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids.is_floating_point() and not input_ids.numel():
        input_ids = input_ids.long()  # tokenizers return floats for an empty text
    size = embedding.num_embeddings
    if may_read(input_ids) and input_ids.numel():
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids")
    return embedding(input_ids)


def expand_mask(attention_mask: Tensor, batch: int, length: int, total: int) -> Tensor:
    """A mask with four dimensions, boolean or float, of `length` queries and `total` keys.

    Args:
        attention_mask: (B, S), 1 for real tokens; or (B or 1, H or 1, T or 1, S), boolean, 0/1 or float.

    Raises:
        ValueError: another shape.
    """
    if attention_mask.dim() == 2:
        if attention_mask.shape != (batch, total):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, expected {(batch, total)}")
        return attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)
    if attention_mask.dim() == 4:
        if attention_mask.shape[-1] != total or attention_mask.shape[-2] not in (1, length):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask is {shape}, expected ({batch}, 1, {length}, {total})")
        return attention_mask if attention_mask.is_floating_point() else attention_mask.bool()
    raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {tuple(attention_mask.shape)}")


def unblock_empty_rows(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask with no query left without a key: a query that may attend to nothing attends to everything.

    The output of such a query has no meaning, but it is finite. A float mask is returned in `dtype`. The lowest numbers of
    a float mask block too: in a narrower type, also later under autocast, they become -inf.
    """
    if mask.dtype == torch.bool:
        return mask | ~mask.any(dim=-1, keepdim=True)
    mask = mask.to(dtype)
    is_empty = mask.amax(dim=-1, keepdim=True) <= torch.finfo(torch.bfloat16).min
    return mask.masked_fill(is_empty, 0.0)


def check_positions(position_ids: Tensor, batch: int, length: int) -> None:
    """Raise ValueError for positions whose shape is not (T,), (1, T) or (B, T)."""
    if position_ids.shape not in ((length,), (1, length), (batch, length)):
        shape = tuple(position_ids.shape)
        raise ValueError(f"position_ids is {shape}, expected ({length},) or ({batch}, {length})")


# ---------------------------------------------------------------------------------------------------------------------
# The language model's head and the critic's
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MaskedLMOutputWithCritic(MaskedLMOutput):
    """Output of a masked language model that may have a critic head.

    Attributes:
        critic_logits: (B, T) log-odds that each token is an error, with `head="both"`.
        origin_logits: (B, T) log-odds that a generator sampled the token, with `head="both"` and `head="critic"`.
    """

    critic_logits: Tensor | None = None
    origin_logits: Tensor | None = None


def check_head(head: str, has_critic: bool, conditioning_mask: Tensor | None) -> None:
    """Raise ValueError for a head that does not exist, or a conditioning mask for a head that does not read it."""
    if head not in HEADS:
        raise ValueError(f'head must be "lm", "critic" or "both", got {head!r}')
    if head != "lm" and not has_critic:
        raise ValueError("this model has no critic head: set critic_layers (0 or more) in its config")
    if conditioning_mask is not None and head != "critic":
        raise ValueError(f'conditioning_mask is for head="critic", not for {head!r}')


def add_conditioning(embeddings: Tensor, conditioning_mask: Tensor, vector: Tensor) -> Tensor:
    """Embeddings (B, T, D) with the vector (1, D) added to the tokens (B, T) that are known to be right."""
    return embeddings + conditioning_mask[..., None].to(vector.dtype) * vector


# ---------------------------------------------------------------------------------------------------------------------
# Logits and losses of tokens
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenHead:
    """What a head makes of hidden states.

    Attributes:
        score: rows (N, D) -> logits (N, C), or (N,) for log-odds.
        loss: (logits, targets), both of the labelled rows -> a number.
        num_classes: of the labels.
    """

    score: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    num_classes: int


def token_outputs(
    hidden: Tensor, labels: Tensor | None, logits_at: Tensor | str | None, head: TokenHead
) -> tuple[Tensor, Tensor | None]:
    """Logits of hidden states (B, T, D), computed only where they are needed, and the loss if there are labels.

    Args:
        labels: (B, T) classes with -100 for ignored positions, or soft labels (B, T, C). With a tensor as `logits_at`
            there may also be one label per chosen position.
        logits_at: None for all positions; flat positions (N,) of the B * T; or "labels" for the labelled positions.

    Returns:
        Logits (B, T, ...) or (N, ...), and the mean loss over labelled positions, or None.

    Raises:
        ValueError: labels of a wrong shape, outside the classes, or all ignored; `logits_at` without what it needs.
    """
    batch, length, width = hidden.shape
    if labels is None:
        if isinstance(logits_at, str):
            raise ValueError(f'logits_at="{logits_at}" needs labels')
        if logits_at is not None:
            return head.score(rows_at(hidden, logits_at)), None
        logits = head.score(hidden.reshape(-1, width))
        return logits.view(batch, length, *logits.shape[1:]), None
    if isinstance(logits_at, Tensor):
        if labels.shape[:2] == (batch, length):  # one label per position of the batch
            labels = labels.flatten(0, 1).index_select(0, logits_at)
        elif labels.shape[0] != logits_at.shape[0] or labels.dim() != 1 + labels.is_floating_point():
            expected = f"{(batch, length)}, or with the {logits_at.shape[0]} positions of logits_at"
            raise ValueError(f"labels are {tuple(labels.shape)}, expected to begin with {expected}")
        logits = head.score(rows_at(hidden, logits_at))
        where, targets = labelled_rows(labels, head.num_classes)
        return logits, head.loss(logits.index_select(0, where), targets)
    if labels.shape[:2] != (batch, length):
        raise ValueError(f"labels are {tuple(labels.shape)}, expected to begin with {(batch, length)}")
    where, targets = labelled_rows(labels, head.num_classes)
    if logits_at == "labels":
        logits = head.score(rows_at(hidden, where))
        return logits, head.loss(logits, targets)
    logits = head.score(hidden.reshape(-1, width))
    loss = head.loss(logits.index_select(0, where), targets)
    return logits.view(batch, length, *logits.shape[1:]), loss


def rows_at(hidden: Tensor, where: Tensor) -> Tensor:
    """Rows (N, D) of hidden states (B, T, D) at flat positions (N,) of the B * T."""
    if where.dim() != 1 or where.is_floating_point() or where.dtype == torch.bool:
        raise ValueError(
            f"logits_at must be a 1-D integer tensor of flat positions, got {where.dtype} {where.shape}"
        )
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)


def labelled_rows(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Flat positions (N,) that have a label, and these labels, (N,) hard or (N, C) soft.

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
    if not is_tracing() and where.numel() == 0:
        raise ValueError(f"no position has a label: all {counts.numel()} are ignored ({IGNORED})")
    rows = rows.index_select(0, where)
    if not labels.is_floating_point():
        _refuse_classes_outside(rows, num_classes, f" (or {IGNORED})")
    return where, rows


def _refuse_classes_outside(labels: Tensor, num_classes: int, or_else: str = "") -> None:
    """Raise ValueError for a label that is no class. `or_else`: what the message names beside the classes."""
    if may_read(labels) and labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"label {low if low < 0 else high} is not one of the {num_classes} classes{or_else}"
            )


def class_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (N, C) against hard (N,) or soft (N, C) targets, in float32 at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), targets.to(exact) if targets.is_floating_point() else targets)


def error_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats of log-odds (N,) against targets (N,) in [0, 1], in float32 at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(logits.to(exact), targets.to(exact))


# ---------------------------------------------------------------------------------------------------------------------
# Logits and losses of sequences
# ---------------------------------------------------------------------------------------------------------------------


def sequence_logits(
    head: Callable[[Tensor], Tensor], pooled: Tensor, dtype: torch.dtype, config: PreTrainedConfig
) -> Tensor:
    """Logits (B, C) of states (B, D), or scores (B, C) in [0, 1] with `score_activation="sigmoid"`.

    `dtype` is the type of the head's weights. The head computes in it, also under autocast, and the sigmoid in float32 at
    least. In bfloat16, close scores would be equal, and scores near 0 and 1 would have no gradient.
    """
    with torch.autocast(pooled.device.type, enabled=False):
        logits = head(pooled.to(dtype))
    if config.score_activation == "sigmoid":
        logits = logits.to(torch.promote_types(dtype, torch.float32)).sigmoid()
    return logits


def sequence_loss(logits: Tensor, labels: Tensor, config: PreTrainedConfig) -> Tensor:
    """The loss of a sequence classifier's logits (B, num_labels).

    `config.problem_type` decides, or else the number of labels and their type. A regression has the mean squared error, one
    class the cross-entropy, several labels at once the binary cross-entropy.

    Raises:
        ValueError: labels whose type, shape or range contradicts the problem.
    """
    batch, num_labels = logits.shape
    problem = config.problem_type or _inferred_problem(labels, num_labels)
    exact = torch.promote_types(logits.dtype, torch.float32)
    if problem == "single_label_classification":
        if num_labels < 2:
            raise ValueError(f"{problem} needs num_labels of at least 2 to tell labels apart, got 1")
        if labels.is_floating_point() or labels.shape != (batch,):
            shape = tuple(labels.shape)
            raise ValueError(
                f"{problem} takes integer labels of shape ({batch},), got {labels.dtype} {shape}"
            )
        _refuse_classes_outside(labels, num_labels)
        return class_loss(logits, labels)
    if labels.numel() != logits.numel() or labels.shape[0] != batch:
        raise ValueError(f"{problem} takes labels of shape {tuple(logits.shape)}, got {tuple(labels.shape)}")
    targets = labels.to(exact).view_as(logits)
    if problem == "multi_label_classification":
        _refuse_outside_unit(targets, problem)
        return F.binary_cross_entropy_with_logits(logits.to(exact), targets)
    if config.score_activation == "sigmoid":
        _refuse_outside_unit(targets, "a score in [0, 1]")
    elif may_read(targets) and not bool(targets.isfinite().all()):
        raise ValueError("regression labels hold NaN or infinity")
    return F.mse_loss(logits.to(exact), targets)


def _inferred_problem(labels: Tensor, num_labels: int) -> str:
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _refuse_outside_unit(targets: Tensor, what: str) -> None:
    if may_read(targets) and not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(f"labels of {what} must lie in [0, 1]")
