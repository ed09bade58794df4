"""The formula of the bytes that one process needs at the worst moment of a training.

    always there    weights, frozen and trained; optimizer moments; EMA
    in a step       gradients; what layers keep for the backward pass; the layer at work, or the logits
    in evaluation   a copy of the trained weights (the EMA takes their place), and one forward pass
    at a checkpoint a copy of the optimizer moments

A layer keeps `width x D + inner x F + heads x H + scores x H x T` bytes for each token, where the four numbers depend on
the kind of backbone and on the precision (`LAYERS`). They are counts of the tensors that autograd saves, weighted by
their bytes, with the kernels of a GPU. `tests/test_training_memory.py` compares them with measured bytes.

With activation checkpointing a layer keeps only its input. In the backward pass one layer at a time is computed again.

Legend: D hidden size, F size of the feed-forward layer, H heads, T tokens of a row, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lib.errors import BadConfig

GB = 1e9
CONTEXT_BYTES = 0.7 * GB  # CUDA's own memory: kernels, and the workspaces of cuBLAS
FRAGMENTATION = 0.05  # of all tensors: what an allocator loses between blocks


class Layer(NamedTuple):
    """Bytes per token that a layer keeps for the backward pass, by size, and those it uses for a moment."""

    width: float  # x D
    inner: float  # x F
    heads: float = 0.0  # x H
    scores: float = 0.0  # x H x T: attention weights or position scores of every pair
    masks: int = 0  # dropouts of D values
    moment: tuple[float, float] = (0.0, 0.0)  # x D, x F: the most that is alive beside what is kept


# Of learning weights; a frozen layer keeps less. Llama: without the inputs of linear layers, which adapters keep
LAYERS = {
    ("llama", "bf16"): Layer(16, 6, 4, moment=(8.5, 6)),
    ("llama", "fp32"): Layer(24, 12, 4, moment=(12, 8)),
    ("bert", "bf16"): Layer(24, 4, 8, masks=2, moment=(14, 0)),
    ("bert", "fp32"): Layer(32, 8, 8, masks=2, moment=(4, 4)),
    ("remask_gpt", "bf16"): Layer(34, 4, 12, masks=2, moment=(24, 1)),
    ("remask_gpt", "fp32"): Layer(44, 8, 14, masks=2, moment=(13, 9)),
    ("ltg_bert", "bf16"): Layer(38, 10, 350, 3, masks=3, moment=(14, 0)),
    ("ltg_bert", "fp32"): Layer(50, 20.5, 690, 3, masks=3, moment=(10, 6)),
}
KINDS = {
    "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "smollm3": "llama",
    "bert": "bert", "roberta": "bert", "xlm-roberta": "bert",
    "remask_gpt": "remask_gpt", "ltg_bert": "ltg_bert",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Numbers of weights.

    Attributes:
        frozen, trained: all of them.
        frozen_bytes, trained_bytes: of one weight.
        matrices: weights of linear layers in float32, which bf16 precision copies in bfloat16.
        by_muon: trained weights with one moment instead of two.
        gathered: bytes that a process needs for a moment, if the frozen weights are divided among processes. A layer
            computes while the next is gathered: what is sent, what arrives, and its copy by tensors. Or the embedding
            is gathered, before the layers.
    """

    frozen: int
    trained: int
    frozen_bytes: int
    trained_bytes: int
    matrices: int
    by_muon: int
    gathered: float = 0.0


@dataclass(frozen=True)
class Backbone:
    """Sizes of a backbone.

    Attributes:
        kind: one of `LAYERS`.
        residual_bytes: of one value of a layer's input.
        adapted: inputs of the adapted linear layers of one transformer layer, all together.
        adapter_outputs: rank x number of the adapted linear layers of one transformer layer.
        conv_width: embeddings that a convolution before the first layer joins for each token.
    """

    kind: str
    layers: int
    width: int
    inner: int
    heads: int
    residual_bytes: int
    adapted: int = 0
    adapter_outputs: int = 0
    conv_width: int = 0


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    Attributes:
        rows, tokens: of a part; tokens of one row.
        masked: whether attention gets a mask of every pair.
        logit_rows: positions of a part for which logits over `classes` are computed.
        evaluation_rows: of a forward pass of an evaluation, with logits for the same share of positions.
    """

    rows: int
    tokens: int
    masked: bool = False
    logit_rows: int = 0
    classes: int = 0
    evaluation_rows: int = 0


@dataclass(frozen=True)
class Plan:
    """How the training runs.

    Attributes:
        parts: of this process.
        sharded: the frozen weights are divided among the processes.
        mask_bytes: of one value's dropout mask: 1 on a GPU, 4 on the CPU, where it is a float.
    """

    precision: str
    checkpointed: bool
    parts: int
    processes: int = 1
    sharded: bool = False
    ema: bool = True
    dropout: bool = False
    adapter_dropout: bool = False
    mask_bytes: int = 1


@dataclass(frozen=True)
class Account:
    """Bytes by item. `peak` is the largest of the three moments; `total` adds what the device itself needs."""

    always: dict[str, float]
    moments: dict[str, dict[str, float]]

    @property
    def worst(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.always.values()) + sum(self.moments[self.worst].values())

    @property
    def total(self) -> float:
        return self.peak * (1 + FRAGMENTATION) + CONTEXT_BYTES


def layer_of(kind: str, precision: str) -> Layer:
    """Raises BadConfig for a kind of backbone without a formula."""
    if (kind, precision) not in LAYERS:
        known = ", ".join(sorted(KINDS))
        raise BadConfig(f"there is no memory formula for a backbone of type {kind}; known: {known}")
    return LAYERS[kind, precision]


def kept_by_layer(backbone: Backbone, batch: Batch, plan: Plan) -> float:
    """Bytes that one layer keeps for the backward pass, without checkpointing."""
    layer, size = layer_of(backbone.kind, plan.precision), 2 if plan.precision == "bf16" else 4
    per_token = layer.width * backbone.width + layer.inner * backbone.inner
    per_token += backbone.heads * (layer.heads + layer.scores * batch.tokens)
    per_token += size * (backbone.adapted + backbone.adapter_outputs)
    per_token += size * batch.tokens * batch.masked  # the mask, in the type of the scores
    per_token += plan.dropout * layer.masks * backbone.width * (size if plan.mask_bytes > 1 else 1)
    per_token += plan.adapter_dropout * plan.mask_bytes * backbone.adapted
    return batch.rows * batch.tokens * per_token


def moment_of_layer(backbone: Backbone, batch: Batch, plan: Plan, rows: int) -> float:
    """The most that a layer uses beside what it keeps, in a pass over some rows."""
    by_width, by_inner = layer_of(backbone.kind, plan.precision).moment
    by_inner += 4 * plan.adapter_dropout  # an input after dropout, in float32
    return rows * batch.tokens * (by_width * backbone.width + by_inner * backbone.inner)


def account(weights: Weights, backbone: Backbone, batch: Batch, plan: Plan) -> Account:
    """The bytes of a training; see the module's docstring."""
    size = 2 if plan.precision == "bf16" else 4
    trained = weights.trained * weights.trained_bytes
    moments = (2 * weights.trained - weights.by_muon) * weights.trained_bytes
    always = {
        "frozen weights": weights.frozen * weights.frozen_bytes / (plan.processes if plan.sharded else 1),
        "trained weights": trained,
        "optimizer moments": moments,
        "EMA": 4.0 * weights.trained * plan.ema,
    }
    # A tree of n parts holds the sums of log2(n) subtrees, beside the newest gradients; an exchange holds four copies
    copies = 1 + (plan.parts.bit_length() - 1) + (4 if plan.processes > 1 else 0)
    layer = kept_by_layer(backbone, batch, plan)
    inputs = batch.rows * batch.tokens * backbone.width * backbone.residual_bytes
    joined = batch.rows * batch.tokens * backbone.width * backbone.conv_width * size
    step = {
        f"gradients ({copies} copies)": float(copies * trained),
        "weights in bfloat16 for products": 2.0 * weights.matrices * (plan.precision == "bf16"),
        "kept activations": backbone.layers * (inputs if plan.checkpointed else layer) + 3 * inputs + joined,
    }
    gathered = {"gathered weights": weights.gathered} if plan.sharded else {}
    at_work = layer * plan.checkpointed + moment_of_layer(backbone, batch, plan, batch.rows)
    # Logits, their soft cap, log-softmax and gradients of all of them
    logits = batch.logit_rows * batch.classes * (8.0 + 4 * size)
    step |= {"layer at work": at_work} if at_work >= logits else {"logits": logits}
    share = batch.logit_rows / max(batch.rows, 1)
    evaluation = {
        "copy of the trained weights": float(trained * plan.ema),
        "weights in bfloat16 for products": step["weights in bfloat16 for products"],
        "forward pass": max(
            moment_of_layer(backbone, batch, plan, batch.evaluation_rows)
            + 5 * batch.evaluation_rows * batch.tokens * backbone.width * size
            + 3 * batch.evaluation_rows * batch.tokens**2 * batch.masked,
            batch.evaluation_rows * share * batch.classes * (8.0 + 2 * size),
        ),
    }
    return Account(
        always,
        {
            "step": step | gathered,
            "evaluation": evaluation | gathered,
            "checkpoint": {"copy of moments": moments},
        },
    )
