"""Any pretrained masked LM behind the interface of this project's models: hidden states, logits at positions, a critic.

The input is a text without special tokens. The model puts its framing tokens ([CLS], [SEP]) around the text itself, and
its outputs have the positions of the text alone. So framing tokens are read, but never masked, predicted or scored.

Two kinds of low-rank adapters (LoRA, Hu et al. 2021) may lie on the backbone. The `adapter` is part of the model in every pass.
The critic's adapter is switched on for the critic's own pass only, so the logits of the language model do not change.

Shapes in comments: B batch, T tokens of the text, F tokens with framing, D hidden size, V vocabulary, N chosen rows, R rank.
"""

import copy
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_adapted import AdaptedConfig
from .configuration_ltg_bert import LtgBertConfig
from .configuration_remask_gpt import RemaskGptConfig
from .modeling_ltg_bert import LtgBertForMaskedLM
from .modeling_remask_gpt import (
    HEAD_STD,
    MIN_ROWS,
    RemaskGptCritic,
    RemaskGptForMaskedLM,
    linear_rows,
    make_linear,
    rms_norm,
    rotary_tables,
)
from .shared_configuration import require_token_classes, sequence_config
from .shared_modeling import (
    MaskedLMOutputWithCritic,
    TokenHead,
    add_conditioning,
    check_head,
    class_loss,
    error_loss,
    expand_mask,
    may_read,
    sequence_logits,
    sequence_loss,
    token_outputs,
    unblock_empty_rows,
)

# The linter of transformers asks which published checkpoints take each side of a branch. These keys choose modes.
# trf-ignore: TRF041 lm_head, critic_layers, critic_rank, critic_mark, adapter_rank, score_activation, shift_logits, backbone_class, backbone_config_class, prefix_ids
EVERY_LINEAR = "all-linear"
MAX_HEAD_DIM = 64  # of the attention in the critic's blocks
UNREAD = ("position_ids", "inputs_embeds", "output_hidden_states", "output_attentions")
OWN_BACKBONES: dict[str, Any] = {  # which transformers alone does not know
    "remask_gpt": (RemaskGptConfig, RemaskGptForMaskedLM),
    "ltg_bert": (LtgBertConfig, LtgBertForMaskedLM),
}


# ---------------------------------------------------------------------------------------------------------------------
# The backbone
# ---------------------------------------------------------------------------------------------------------------------


def make_backbone(config: AdaptedConfig) -> Any:
    """The pretrained model with new weights.

    Raises:
        ValueError: code files differ from those that the config pins.
    """
    values = dict(config.backbone)
    if values["model_type"] in OWN_BACKBONES:
        of_config, of_model = OWN_BACKBONES[values.pop("model_type")]
        return of_model(_with_dropout(of_config(**values), config.dropout))
    if config.backbone_class is None or config.backbone_config_class is None:
        inner = AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoModelForMaskedLM.from_config(_with_dropout(inner, config.dropout))
    folder = Path(str(config.name_or_path))
    check_code(folder, config.code_files)
    inner = _own_class(config.backbone_config_class, folder)(
        **{k: v for k, v in values.items() if k != "model_type"}
    )
    return _own_class(config.backbone_class, folder)(_with_dropout(inner, config.dropout))


def _own_class(reference: str, folder: Path) -> Any:
    return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)


def check_code(folder: Path, expected: dict[str, str]) -> None:
    """Raise ValueError if the code files of a folder are not those of the hashes."""
    for name, digest in expected.items():
        file = folder / name
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "nothing"
        if found != digest:
            raise ValueError(f"{file} has sha256 {found}, expected {digest}; its code is not run")


def _with_dropout(inner: Any, probability: float) -> Any:
    """The config with every dropout probability replaced. `token_dropout` of ESM is a switch and stays."""
    for key, value in inner.to_dict().items():
        if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(inner, key, probability)
    return inner


def with_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with parameters of this type. Buffers and adapters keep theirs.

    Rounded rotary frequencies would move late positions. Rounded adapters would ignore small updates.
    """
    adapters = {id(p) for m in model.modules() if isinstance(m, LowRank) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.data = parameter.data.to(dtype)
    return model


class _Given(nn.Module):
    """Stands in for the backbone below a language model's head: its hidden states are known already."""

    def __init__(self, hidden: Tensor, base: nn.Module):
        super().__init__()
        self.hidden, self._base = hidden, (base,)

    def forward(self, *args, **kwargs) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.hidden)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some heads read the embeddings of the backbone
            return getattr(self.__dict__["_base"][0], name)


def logits_of(backbone: Any, hidden: Tensor) -> Tensor:
    """Logits (N, V) of hidden states (N, D), by the head of a masked LM of transformers without its backbone."""
    rows = hidden.shape[0]
    if rows < MIN_ROWS:  # few rows have other bits on the CPU
        hidden = F.pad(hidden, (0, 0, 0, MIN_ROWS - rows))
    head = copy.copy(backbone)
    given = _Given(hidden[None], backbone.base_model)
    head._modules = backbone._modules | {backbone.base_model_prefix: given}
    ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
    return head(input_ids=ids).logits[0, :rows]


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """What an adapter adds to the output of a linear layer: x A' B' alpha / R. B starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))  # A
        self.up = nn.Parameter(torch.empty(layer.out_features, rank))  # B
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)) * self.scale

    def product(self) -> Tensor:
        """What it adds to the weight of the layer."""
        return self.up @ self.down * self.scale


class _Hook:
    """Adds an adapter's output to a layer's, while it is switched on. An object, so that copies of a model have their own."""

    def __init__(self, owner: "Adapters", added: LowRank):
        self.owner, self.added = owner, added

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self.added(args[0]) if self.owner.is_on else output


class Adapters(nn.ModuleList):
    """Low-rank adapters on the linear layers of a backbone.

    A layer whose weight is also an embedding has none: merged, it would change the embedding, too.

    Attributes:
        names: of the layers, in the order of the adapters.
        is_on: whether the layers use them.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, targets: str = EVERY_LINEAR):
        endings = tuple(word.strip() for word in targets.split(","))
        embeddings = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
        layers = {
            name: module
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear)
            and (targets == EVERY_LINEAR or name.endswith(endings))
            and id(module.weight) not in embeddings
        }
        if not layers:
            raise ValueError(f"adapter_targets {targets!r}: the backbone has no such linear layers")
        super().__init__(LowRank(layer, rank, alpha) for layer in layers.values())
        self.names, self.is_on = list(layers), True
        for layer, added in zip(layers.values(), self, strict=True):
            layer.register_forward_hook(_Hook(self, added))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------------------------
# Framing
# ---------------------------------------------------------------------------------------------------------------------


def refuse_unread(arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments of other models that would have no effect here. None and False ask for nothing.

    The caller's text has no framing tokens, so its positions, embeddings and states are not those of the backbone.
    """
    given = [name for name in UNREAD if arguments.get(name) is not None and arguments[name] is not False]
    if given:
        raise ValueError(f"a model with a pretrained backbone does not read {', '.join(given)}")


class AdaptedPreTrainedModel(PreTrainedModel):
    """The pretrained model with framing, adapters and hidden states, for all heads."""

    config: AdaptedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = AdaptedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = False
    backbone: Any

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    # trf-ignore: TRF018  (every parameter is filled here; two fillings would draw twice)
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the parameters of heads and adapters. The backbone fills its own."""
        if isinstance(module, LowRank):
            init.normal_(module.down, std=module.down.shape[1] ** -0.5)
            init.zeros_(module.up)
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            return
        default_std = HEAD_STD if isinstance(module, nn.Embedding) else module.in_features**-0.5
        module_std = getattr(module, "initial_std", None)
        std = default_std if module_std is None else module_std
        if std:
            init.normal_(module.weight, std=std)
        else:
            init.zeros_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)

    def _add_backbone(self, *, with_lm_head: bool) -> None:
        """Make the backbone and the adapter. A classifier has no language model's head, unless the two are one."""
        self.backbone = make_backbone(self.config)
        if self.config.lm_head == "separate" and not with_lm_head:
            for name, _ in list(self.backbone.named_children()):
                if name != self.backbone.base_model_prefix:
                    delattr(self.backbone, name)
            self.backbone._tied_weights_keys = None
            self.backbone.all_tied_weights_keys = {}
        self._added: Tensor | None = None  # to the embeddings, in the critic's pass
        self.get_input_embeddings().register_forward_hook(self._add_to_embeddings)
        rank = self.config.adapter_rank
        self.adapter = None
        if rank is not None:
            self.adapter = Adapters(self._base, rank, self.config.adapter_alpha, self.config.adapter_targets)

    @property
    def _base(self) -> Any:
        """The part of the pretrained model without its head, or all of it if it does not tell them apart."""
        return self.backbone.base_model if self.config.lm_head == "separate" else self.backbone

    @property
    def pretrained_prefix(self) -> str:
        """Prefix of the names of the pretrained parameters that every head shares."""
        return (
            "backbone." if self.config.lm_head == "whole" else f"backbone.{self.backbone.base_model_prefix}."
        )

    @property
    def backbone_names(self) -> tuple[str, ...]:
        """Prefixes of the names of the parameters that are not the head's: the pretrained ones, and the adapter on them."""
        return self.pretrained_prefix, "adapter."

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def merged(self) -> "AdaptedPreTrainedModel":
        """A model without the adapter that computes the same: its products are added to the weights."""
        if self.adapter is None:
            return self
        config = copy.deepcopy(self.config)
        config.adapter_rank = None
        state = {n: v.detach().clone() for n, v in self.state_dict().items() if not n.startswith("adapter.")}
        for name, added in zip(self.adapter.names, self.adapter, strict=True):
            key = f"{self.pretrained_prefix}{name}.weight"
            # The sum has the wider type of the two, so it is rounded only once.
            merged = state[key] + cast(Any, added).product().detach()
            state[key] = merged.to(state[key].dtype)
        with torch.random.fork_rng(devices=[]):
            kind: Any = type(self)
            model = with_dtype(kind(config), self.dtype).to(self.device)
        model.load_state_dict(state)
        return model.train(self.training)

    def frame(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, F) ids with the framing tokens around each text, and (B, F) validity, None without padding.

        Args:
            input_ids: (B, T); attention_mask: (B, T), 1 for the tokens of the text, which come first. None: all are.

        Raises:
            ValueError: a mask of another shape, or padding in front of a text that gets framing tokens.
        """
        batch = len(input_ids)
        before, after = self.config.prefix_ids, self.config.suffix_ids
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must have 2 dimensions, got {tuple(attention_mask.shape)}")
        if not before and not after:
            return input_ids, None if attention_mask is None else attention_mask.long()
        front = input_ids.new_tensor(before).expand(batch, -1)
        back = input_ids.new_tensor(after).expand(batch, -1)
        if attention_mask is None:
            return torch.cat([front, input_ids, back], 1), None
        pad = self.config.pad_token_id or 0
        valid = attention_mask.bool()
        if may_read(valid) and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            raise ValueError(
                'padding must come last, behind the text: set padding_side="right" in the tokenizer'
            )
        text = input_ids.masked_fill(~valid, pad)
        framed = torch.cat([front, text, torch.full_like(back, pad)], 1)  # (B, F)
        lengths = valid.sum(1, keepdim=True) + len(before)  # (B, 1)
        where = lengths + torch.arange(len(after), device=input_ids.device)
        framed = framed.scatter(1, where, back)
        positions = torch.arange(framed.shape[1], device=input_ids.device)
        return framed, (positions < lengths + len(after)).long()

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, F, D) of framed texts; with `lm_head` "whole" also logits (B, F, V).

        `input_ids` and `attention_mask` are those of `frame`.
        """
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        if self.config.lm_head == "separate":
            return self._base(input_ids=input_ids, return_dict=True, **masks)[0], None
        output = self.backbone(input_ids=input_ids, output_hidden_states=True, return_dict=True, **masks)
        return output.hidden_states[-1], output.logits

    def _add_to_embeddings(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self._added is None:
            return output
        missing = (
            output.shape[1] - self._added.shape[1]
        )  # some backbones pad a text to a multiple of a window
        return output + F.pad(self._added, (0, 0, 0, missing))

    @contextmanager
    def _added_to_embeddings(self, positions: Tensor | None, vector: Tensor):
        """While active, `vector` (1, E) is added to the embeddings at the (B, T) positions of the text."""
        if positions is not None:
            before, after = len(self.config.prefix_ids), len(self.config.suffix_ids)
            where = F.pad(positions, (before, after))  # (B, F)
            self._added = where[..., None].to(vector.dtype) * vector
        try:
            yield
        finally:
            self._added = None

    def of_text(self, framed: Tensor, length: int, shift: int = 0) -> Tensor:
        """The rows (B, T, ...) of the text's tokens in (B, F, ...). `shift` 1: of the token before each."""
        first = len(self.config.prefix_ids) - shift
        if first >= 0:
            return framed[:, first : first + length]
        return torch.cat([framed[:, :1], framed[:, : length - 1]], 1)


# ---------------------------------------------------------------------------------------------------------------------
# The language model
# ---------------------------------------------------------------------------------------------------------------------


class AdaptedForMaskedLM(AdaptedPreTrainedModel):
    """Bidirectional masked language model with a pretrained backbone, and an optional critic."""

    def __init__(self, config: AdaptedConfig):
        super().__init__(config)
        self._add_backbone(with_lm_head=True)
        self.critic = None
        if config.critic_layers is not None:
            self.critic = RemaskGptCritic(_critic_config(config))
            embeddings: Any = self.get_input_embeddings()
            width = int(embeddings.weight.shape[1])
            self._marks_states = config.critic_mark == "states"
            self.critic.given = nn.Embedding(1, config.hidden_size if self._marks_states else width)
            self.critic.given.initial_std = 0.0  # pyright: ignore[reportArgumentType]
            self.critic.own = make_linear(width, config.hidden_size, bias=False, initial_std=0.0)
            if config.critic_rank is not None:
                self.critic.lora = Adapters(self._base, config.critic_rank, config.critic_alpha)
                self.critic.lora.is_on = False
        self.post_init()

    @property
    def separate_critic_pass(self) -> bool:
        """Whether the critic needs a forward pass of its own, since its adapter changes the hidden states."""
        return self.config.critic_rank is not None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_at: Tensor | str | None = None,
        head: str = "lm",
        conditioning_mask: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutputWithCritic:
        """Logits over the vocabulary, or log-odds that a token is an error.

        Args:
            input_ids: (B, T), texts without special tokens. Padding comes last.
            labels, logits_at, head, conditioning_mask: as in `RemaskGptForMaskedLM.forward`.

        Returns:
            `logits` (B, T, V) or (N, V) for "lm", (B, T) or (N,) for "critic".
        """
        check_head(head, self.critic is not None, conditioning_mask)
        refuse_unread(kwargs)
        length = input_ids.shape[1]
        framed, valid = self.frame(input_ids, attention_mask)
        # 1. The language model
        hidden: Any = None
        scored: Any = None
        token_head = TokenHead(self.lm_logits, class_loss, self.config.vocab_size)
        if head != "critic":
            hidden, known = self.states(framed, valid)
            scored = hidden
            if known is not None:  # the backbone has computed the logits already
                scored = known
                token_head = TokenHead(self._known_ids, class_loss, self.config.vocab_size)
            scored = self.of_text(scored, length, int(self.config.shift_logits))  # (B, T, D) or (B, T, V)
        # 2. The critic: from the same hidden states, unless its adapter or its conditioning changes them
        critic_logits = origin_logits = None
        if self.critic is not None and head != "lm":
            before, after = (None, conditioning_mask) if self._marks_states else (conditioning_mask, None)
            if head == "critic" or self.separate_critic_pass:
                hidden = self._critic_pass(self.critic, framed, valid, before)
            states = self._critic_states(
                self.critic, self.of_text(hidden, length), input_ids, attention_mask, after
            )
            origin_logits = self.critic.origin_logits(states)
            if head == "both":
                critic_logits = self.critic.score_rows(states.flatten(0, 1)).view(states.shape[:2])
            else:
                scored, token_head = states, TokenHead(self.critic.score_rows, error_loss, 2)
                labels = None if labels is None else labels.long()
        # 3. Logits and loss of the head that was asked for
        logits, loss = token_outputs(scored, labels, logits_at, token_head)
        return MaskedLMOutputWithCritic(
            loss=loss, logits=logits, critic_logits=critic_logits, origin_logits=origin_logits
        )  # pyright: ignore[reportArgumentType]

    def lm_logits(self, rows: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D); bits do not depend on N."""
        return self._known_ids(logits_of(self.backbone, rows))

    def _known_ids(self, logits: Tensor) -> Tensor:
        """The logits of the ids that the tokenizer has."""
        return logits[..., : self.config.vocab_size]

    def _critic_pass(
        self, critic: RemaskGptCritic, framed: Tensor, valid: Tensor | None, marked: Tensor | None
    ) -> Tensor:
        """Hidden states (B, F, D) for the critic, with its adapter. The mark is added to the embeddings of `marked` (B, T)."""
        adapter: Any = critic.lora if self.separate_critic_pass else None
        try:
            if adapter is not None:
                adapter.is_on = True
            with self._added_to_embeddings(marked, critic.given.weight):
                return self.states(framed, valid)[0]
        finally:
            if adapter is not None:
                adapter.is_on = False

    def _critic_states(
        self,
        critic: RemaskGptCritic,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        marked: Tensor | None,
    ) -> Tensor:
        """The critic's states (B, T, D) of the text's hidden states (B, T, D), which are normalised first.

        The mark is added to the states of `marked` (B, T).

        Each state is multiplied by a linear function of its token's embedding. So a linear score can tell whether the state
        predicts the token, as the logits of the language model do. A sum of both could not, and a frozen backbone has no
        other reason to compare them: it learned to predict hidden tokens.
        """
        batch, length, _ = hidden.shape
        hidden = rms_norm(hidden, critic.eps)
        embeddings: Any = self.get_input_embeddings()
        token = rms_norm(F.embedding(input_ids, embeddings.weight), critic.eps)
        hidden = hidden + hidden * cast(nn.Module, critic.own)(token)
        if marked is not None:
            hidden = add_conditioning(hidden, marked, critic.given.weight)
        mask = None
        if attention_mask is not None:
            mask = unblock_empty_rows(expand_mask(attention_mask, batch, length, length), hidden.dtype)
        config = _critic_config(self.config)
        positions = torch.arange(length, device=hidden.device)
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta, hidden.dtype)
        return critic(hidden, rotary, mask)


def _critic_config(config: AdaptedConfig) -> RemaskGptConfig:
    """The config of the critic's own blocks: as wide as the backbone, with heads of at most `MAX_HEAD_DIM`."""
    size = config.hidden_size
    sizes = [d for d in range(2, MAX_HEAD_DIM + 1, 2) if size % d == 0]
    heads = size // max(sizes) if sizes else 1
    return RemaskGptConfig(
        vocab_size=config.vocab_size, hidden_size=size, num_hidden_layers=0, num_attention_heads=heads,
        max_position_embeddings=config.max_position_embeddings, critic_layers=config.critic_layers,
        pad_token_id=None, mask_token_id=None, cls_token_id=None, unk_token_id=None,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers
# ---------------------------------------------------------------------------------------------------------------------


class AdaptedForTokenClassification(AdaptedPreTrainedModel):
    """A class for every token."""

    def __init__(self, config: AdaptedConfig):
        super().__init__(config)
        self.num_labels = require_token_classes(config)
        self._add_backbone(with_lm_head=False)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = make_linear(config.hidden_size, self.num_labels, bias=True, initial_std=HEAD_STD)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Class logits (B, T, num_labels). `labels`: as in `RemaskGptForTokenClassification.forward`."""
        refuse_unread(kwargs)
        hidden, _ = self.states(*self.frame(input_ids, attention_mask))
        hidden = self.dropout(self.of_text(hidden, input_ids.shape[1]))
        logits, loss = token_outputs(
            hidden, labels, None, TokenHead(self._score, class_loss, self.num_labels)
        )
        return TokenClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    def _score(self, rows: Tensor) -> Tensor:
        return linear_rows(rows, self.classifier.weight, self.classifier.bias)


class AdaptedForSequenceClassification(AdaptedPreTrainedModel):
    """A class, several labels, a number, or a score in [0, 1] for the whole sequence."""

    def __init__(self, config: AdaptedConfig):
        config = sequence_config(config)
        super().__init__(config)
        self.num_labels: int = config.num_labels  # pyright: ignore[reportAttributeAccessIssue]
        self._add_backbone(with_lm_head=False)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = make_linear(config.hidden_size, self.num_labels, bias=True, initial_std=HEAD_STD)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels), or scores (B, 1) in [0, 1] with `score_activation="sigmoid"`.

        Args:
            input_ids: (B, 1 + T), texts with one special token in front. A backbone with framing tokens reads its own
                instead of it. The state of the first token is classified.
            labels: as in `RemaskGptForSequenceClassification.forward`.
        """
        refuse_unread(kwargs)
        if self.config.prefix_ids:
            input_ids = input_ids[:, 1:]
            attention_mask = None if attention_mask is None else attention_mask[:, 1:]
        hidden, _ = self.states(*self.frame(input_ids, attention_mask))
        logits = sequence_logits(self._score, hidden[:, 0], self.classifier.weight.dtype, self.config)
        loss = None if labels is None else sequence_loss(logits, labels, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    def _score(self, pooled: Tensor) -> Tensor:
        return linear_rows(self.dropout(pooled), self.classifier.weight, self.classifier.bias)


AdaptedForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
AdaptedForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
AdaptedForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "AdaptedForMaskedLM",
    "AdaptedForSequenceClassification",
    "AdaptedForTokenClassification",
    "AdaptedPreTrainedModel",
]
