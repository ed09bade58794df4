"""The candidate ranker: one unbounded score for each of the K candidates of a prompt, which is read once for all K.

The backbone is any Hugging Face `AutoModel` that takes positions and a 4-D mask, with or without LoRA.

Shapes: N pools, K candidates, B rows, T tokens of a row, D hidden size, M candidates that are present.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import randomness
from lib.devices import to_device
from lib.errors import BadConfig, BadData
from lib.log import say
from lib.models.backbones import (
    arguments_of,
    attention_of,
    is_causal_backbone,
    position_offset,
    why_not_packed,
    width_of,
)
from lib.models.block_attention import BLOCKS, block_mask
from lib.models.packing import (
    Packed,
    Pools,
    by_length,
    first_token_index,
    last_token_index,
    pack,
    pack_by_tokens,
)

POOLINGS = ("last", "cls", "mean")
HEADS = ("mlp", "linear", "yes_no")
ATTENTIONS = ("prefix", "full")
HEAD_STD = 0.02  # of the initial weights: a new head starts with scores near 0


@dataclass(frozen=True)
class HeadOptions:
    """The score head.

    Attributes:
        kind: "mlp" (two layers), "linear" (one; the kind that `export_classifier` takes), or "yes_no" (one that does not
            learn; see `CandidateRanker.answer_by`).
        dropout: before the last layer.
    """

    kind: str = "mlp"
    dropout: float = 0.1


class ScoreHead(nn.Module):
    """One number per vector: Linear - GELU - Dropout - Linear, or one Linear.

    The single layer has no bias: it could not change a ranking, and stock classifiers can hold the layer as it is.
    """

    def __init__(self, width: int, options: HeadOptions, seed: int):
        super().__init__()
        has_dense = options.kind == "mlp"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.key(seed, "score head") % 2**63)
            self.dense = nn.Linear(width, width) if has_dense else None
            self.dropout = nn.Dropout(options.dropout)
            self.out = nn.Linear(width, 1, bias=has_dense)
            nn.init.normal_(self.out.weight, std=HEAD_STD)
            if self.out.bias is not None:
                nn.init.zeros_(self.out.bias)

    def take(self, weights: Tensor) -> None:
        """Use (D,) weights that do not learn."""
        with torch.no_grad():
            self.out.weight.copy_(weights[None])
        self.out.weight.requires_grad_(False)
        self.dropout.p = 0.0

    def forward(self, pooled: Tensor) -> Tensor:
        """(...) scores of vectors (..., D), in the head's precision, also under autocast."""
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(self.out.weight.dtype)
            if self.dense is not None:
                pooled = F.gelu(self.dense(pooled))
            return self.out(self.dropout(pooled)).squeeze(-1)


class CandidateRanker(nn.Module):
    """Scores (N, K) of the candidates of N prompts.

    With attention "prefix", the prompt attends to itself only, and every candidate to the prompt and itself. So a causal
    backbone is used as it is, and a bidirectional one as a prefix-LM, in training and in use. All candidates share one
    row with their prompt, with the same scores as in separate rows. With attention "full", for bidirectional
    backbones, every candidate is read with its own copy of the prompt, and both attend to each other.

    Args:
        backbone: a model with `last_hidden_state`, or peft's wrapping of one.
        pooling: the "last" token of the candidate, its first one ("cls"), or the "mean" of its tokens. With attention
            "full", "cls" is the first token of the sequence, and the backbone's pooler is applied if there is one.
        head: the score head.
        seed: the head's initial weights are a function of it.
        packs: whether `forward` packs candidates into one row, as a saved ranker records. None: determined by a test on
            tokens that depend on the vocabulary alone, so a resumed training packs as before.

    Attributes:
        is_causal: whether the backbone's tokens attend only to earlier ones.
        prompt_tokens, candidate_tokens: the lengths that it was trained with, for its record; None if not known.
        suffix: the text behind every candidate that it was trained with.
        blind: it was trained with empty prompts, as a control, and reads no other ones.
        segments: whether candidates are the second segment of the backbone's token types, as in BERT.

    Raises:
        BadConfig: an unknown choice, or one that the backbone does not support. Attention "prefix" needs a bidirectional
            backbone that separates the candidates of a row.
    """

    backbone_names = ("backbone.",)  # of parameters that are not the head's

    def __init__(
        self,
        backbone: Any,
        *,
        pooling: str = "last",
        head: HeadOptions = HeadOptions(),
        attention: str = "prefix",
        seed: int,
        packs: bool | None = None,
    ):
        super().__init__()
        for name, value, known in (
            ("pooling", pooling, POOLINGS), ("head", head.kind, HEADS), ("attention", attention, ATTENTIONS),
        ):  # fmt: skip
            if value not in known:
                raise BadConfig(f"ranker.{name} is {value!r}; it must be one of {', '.join(known)}")
        self.backbone = backbone
        self.pooling, self.head_kind, self.attention = pooling, head.kind, attention
        base = self.base
        self.config = base.config
        self.is_causal = is_causal_backbone(base)
        if self.is_causal and attention == "full":
            raise BadConfig(
                "ranker.attention is full, but this backbone is causal, so no token attends to later ones; set it to prefix"
            )
        self.segments = getattr(base.config, "type_vocab_size", 0) >= 2 and not self.is_causal
        self._accepted = arguments_of(base)
        self._position_offset = position_offset(base)
        self._pooler = pooling == "cls" and attention == "full" and getattr(base, "pooler", None) is not None
        self._window_warned = False
        self.prompt_tokens: int | None = None
        self.candidate_tokens: int | None = None
        self.suffix = ""
        self.blind = False
        self.one_pass = (
            False  # with ranker.shard: processes compute together, so each has one forward pass per batch
        )
        first = next(base.parameters())
        exact = torch.promote_types(first.dtype, torch.float32)
        self.head = ScoreHead(width_of(base), head, seed).to(first.device, exact)
        self.packs = attention == "prefix" and (self._may_pack() if packs is None else packs)

    def answer_by(self, yes: Tensor, no: Tensor) -> None:
        """Score by the logit of one token less that of another, from (D,) rows of a language model's output layer.

        The question about the candidate is the `suffix`. So a causal language model is a ranker without new weights.
        """
        self.head.take((yes - no).to(self.head.out.weight))

    @property
    def base(self) -> Any:
        """The backbone without peft's wrapper."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone

    def forward(self, pools: Pools) -> Tensor:
        """(N, K) scores in float32 (float64 for a float64 backbone), -inf for absent candidates."""
        return self._scores(self.features(pools), pools)

    def score_packed(self, pools: Pools) -> Tensor:
        """`forward`, with all candidates of a prompt in one row."""
        return self._scores(self._joined([pack(pools)], pools), pools)

    def score_one_by_one(self, pools: Pools) -> Tensor:
        """`forward`, with a row for every candidate and its own copy of the prompt."""
        return self._scores(self._separate_features(pools), pools)

    def features(self, pools: Pools) -> Tensor:
        """(N, K, D) pooled vectors; those of absent candidates are zero."""
        if not self.packs:
            return self._separate_features(pools)
        parts = pack_by_tokens(pools, width_of(self.base), self.one_pass)
        if any(self._beyond_window(packed) for packed in parts):
            return self._separate_features(pools)
        return self._joined(parts, pools)

    @torch.no_grad()
    def self_check(self, pools: Pools) -> tuple[float, float]:
        """Largest difference of packed and separate (scores, pooled vectors) on some pools, in evaluation mode.

        The difference of the vectors is relative to their norm, because a new head hides it. (0, 0) with attention "full",
        which is never packed.
        """
        if self.attention == "full":
            return 0.0, 0.0
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            # In full precision, because rounding would hide or cause differences.
            with torch.autocast(next(self.parameters()).device.type, enabled=False):
                packed, separate = self._joined([pack(pools)], pools), self._separate_features(pools)
                present = pools.present().to(packed.device)
                difference = (self.head(packed) - self.head(separate))[present].abs().max()
        finally:
            for module, mode in modes.items():
                module.training = mode
        packed, separate = packed[present], separate[present]  # (M, D)
        size = separate.norm(dim=-1).clamp_min(1e-12)
        return float(difference), float(((packed - separate).norm(dim=-1) / size).max())

    # --- the backbone ---------------------------------------------------------------------------------------------------

    def _may_pack(self) -> bool:
        """Whether the backbone takes packed rows and separates their candidates.

        If not, a causal backbone reads candidates one by one, with a warning. For a bidirectional one, raises BadConfig.
        """
        problem = why_not_packed(self.base)
        if problem is not None and not self.is_causal:
            raise BadConfig(
                f"{type(self.base).__name__} cannot be a prefix-LM: {problem}. Set ranker.attention to full"
            )
        if problem is not None:
            say(
                f"WARNING: {type(self.base).__name__} cannot read several candidates in a row: {problem}. "
                "They are scored one by one, which is as exact but several times slower"
            )
        return problem is None

    def _beyond_window(self, packed: Packed) -> bool:
        """Whether the backbone's sliding window would hide tokens that the packed mask shows."""
        window = getattr(self.config, "sliding_window", None)
        if window is None or packed.longest <= window:
            return False
        if not self.is_causal:
            raise BadConfig(
                f"prompt and candidate have {packed.longest} tokens, the backbone's sliding window {window}: as a "
                "prefix-LM it would attend beyond its window. Set ranker.attention to full, or shorten them"
            )
        if not self._window_warned:
            say(
                f"WARNING: prompt and candidate have {packed.longest} tokens, the backbone's sliding window {window}: "
                "such pools are scored one by one"
            )
        self._window_warned = True
        return True

    def _states(self, packed: Packed, ordinary: bool) -> Any:
        """The backbone's output for rows of tokens.

        `ordinary` rows have one candidate each and are read in the usual way: with a mask of two dimensions, without
        positions. The others have a 4-D mask and positions.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        # A limit of -1, as of XLNet, is none.
        if limit is not None and limit > 0 and packed.longest > limit - self._position_offset:
            raise BadData(
                f"prompt and candidate have {packed.longest} tokens together, but this backbone has only "
                f"{limit - self._position_offset} positions; lower ranker.prompt_tokens or ranker.candidate_tokens"
            )
        arguments: dict[str, Any] = {"input_ids": packed.ids}
        if self.segments and "token_type_ids" in self._accepted:
            arguments["token_type_ids"] = (packed.owner > 0).long()
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        if ordinary:
            arguments["attention_mask"] = (packed.owner >= 0).long()
        else:
            arguments["attention_mask"] = self._mask(packed)
            if "position_ids" in self._accepted:
                arguments["position_ids"] = packed.positions + self._position_offset
        return self.backbone(**arguments)

    def _mask(self, packed: Packed) -> Any:
        """The mask of packed rows, in the form that the backbone's attention takes."""
        kind = attention_of(self.base)
        if kind == BLOCKS:
            return block_mask(packed, self.is_causal)
        visible = packed.visible(self.is_causal)
        return visible if kind == "sdpa" else self._additive(visible)

    def _additive(self, visible: Tensor) -> Tensor:
        dtype = next(self.base.parameters()).dtype
        none = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, none, torch.finfo(dtype).min)

    # --- from states to scores ---------------------------------------------------------------------------------------

    def _packed_features(self, packed: Packed, ordinary: bool = False) -> Tensor:
        """(B, K, D) pooled vectors of packed rows."""
        packed = packed.to(next(self.base.parameters()).device)
        output = self._states(packed, ordinary)
        states, members = output.last_hidden_state, packed.members()  # (B, T, D), (B, K, T)
        present = members.any(-1, keepdim=True)  # (B, K, 1)
        if self.pooling == "mean":
            weights = members.to(states.dtype)
            return (weights @ states) / weights.sum(-1, keepdim=True).clamp_min(1)
        if self._pooler:
            return output.pooler_output.unsqueeze(1)
        if self.pooling == "cls" and self.attention == "full":
            return states[:, :1]
        index = last_token_index(members) if self.pooling == "last" else first_token_index(members)  # (B, K)
        row = torch.arange(len(index), device=index.device)[:, None]
        return states[row, index].masked_fill(~present, 0.0)

    def _joined(self, parts: list[Packed], pools: Pools, ordinary: bool = False) -> Tensor:
        """(N, K, D) pooled vectors of the candidates in some forward passes. Those of absent candidates are zero."""
        found, where = [], []
        for packed in parts:
            features = self._packed_features(packed, ordinary)  # (B, C, D)
            where_in_row = tuple(to_device(index, features.device) for index in (packed.row, packed.number))
            found.append(features[where_in_row])  # (M, D)
            # A mask as index would let the program wait for the GPU, to count its ones
            where.append(
                tuple(to_device(index, features.device) for index in (packed.pool, packed.candidate))
            )
        vectors = torch.cat(found)
        index = tuple(torch.cat(part) for part in zip(*where, strict=True))
        return vectors.new_zeros(*pools.present().shape, vectors.shape[-1]).index_put(index, vectors)

    def _separate_features(self, pools: Pools) -> Tensor:
        """(N, K, D) pooled vectors, from one row per present candidate. Rows of similar length share a pass."""
        ordinary = self.is_causal or self.attention == "full"
        parts = []
        for part in [pools] if self.one_pass else by_length(pools, self.head.out.weight.device.type):
            alone = pack(part.separate())
            row, number = part.present().nonzero(as_tuple=True)
            parts.append(replace(alone, pool=row, candidate=number))
        if not ordinary:
            for packed in parts:
                self._beyond_window(packed)
        return self._joined(parts, pools, ordinary)

    def _scores(self, features: Tensor, pools: Pools) -> Tensor:
        absent = to_device(~pools.present(), features.device)
        return self.head(features).masked_fill(absent, -torch.inf)


class SequenceRanker(nn.Module):
    """An encoder with one unbounded score per sequence, over pools of candidates.

    `encoder` is any model whose forward returns `logits` (B, 1) for (B, T) ids. The text task has no prompt, so every
    candidate is one sequence.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(N, K) scores of (N, K, T) ids with (N, K, T) bool validity, None if all are valid."""
        pools, candidates, length = input_ids.shape
        mask = None if attention_mask is None else attention_mask.view(-1, length)
        logits = self.encoder(input_ids=input_ids.view(-1, length), attention_mask=mask).logits  # (N K, 1)
        return logits.view(pools, candidates)
