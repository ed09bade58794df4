"""Configuration of a pretrained masked LM of another project behind the interface of this project's models.

See `shared_configuration.py` for how a saved folder comes to carry this file.
"""

from typing import Any

from transformers import PreTrainedConfig

from .shared_configuration import SCORE_ACTIVATIONS, ConfigProblems, refuse_unknown_keys

HEADS = ("separate", "whole")
MARKS = ("embeddings", "states")


# trf-ignore: TRF010  (check() refuses more than types, all problems at once)
class AdaptedConfig(PreTrainedConfig):
    """A backbone of any kind, and how texts are put before it.

    Args:
        backbone: the config of the pretrained model, as a dict with its `model_type`.
        backbone_class: `file.Class` of a model whose code is in its folder; None for a model that transformers has.
        backbone_config_class: the same of its config.
        code_files: name -> sha256 of the code files. No other code is run.
        vocab_size: number of ids of the tokenizer. The pretrained model may have more; these are never predicted.
        hidden_size: size D of the hidden states.
        max_position_embeddings: tokens of a text, plus one.
        prefix_ids, suffix_ids: special tokens around a text, such as [CLS] and [SEP]. The model adds them itself. They are
            no positions of its input: they are never masked and have no logits.
        lm_head: "separate": hidden states and logits are computed apart, so logits only where they are wanted.
            "whole": the pretrained model computes both at once.
        shift_logits: the logits of a token are those that the pretrained model gives one position earlier, as in models
            that were converted from autoregressive ones.
        dropout: replaces every dropout probability of the backbone.
        pad_token_id, mask_token_id, cls_token_id, unk_token_id: special ids, each inside the vocabulary or None.
        adapter_rank, adapter_alpha: LoRA on the linear layers of the backbone; rank None: none.
        adapter_targets: "all-linear", or endings of layer names separated by commas.
        critic_layers: None for no critic head; n >= 0 for n transformer blocks and two linear layers with one output.
        critic_rank, critic_alpha: LoRA on the backbone that only the critic's own forward pass uses; rank None: none.
        critic_mark: where the critic marks conditioning tokens. "embeddings": in the input of the backbone. "states": in its
            hidden states, for a frozen backbone. It has not learned what a mark in its input means.
        score_activation: "none", or "sigmoid" for a sequence head with one label whose score lies in [0, 1].

    Raises:
        ValueError: an unknown key (the message names the nearest right one), or values that no model can be built from.
    """

    model_type = "remask_adapted"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        backbone_class: str | None = None,
        backbone_config_class: str | None = None,
        code_files: dict[str, str] | None = None,
        vocab_size: int = 70,
        hidden_size: int = 192,
        max_position_embeddings: int = 128,
        prefix_ids: list[int] | None = None,
        suffix_ids: list[int] | None = None,
        lm_head: str = "separate",
        shift_logits: bool = False,
        dropout: float = 0.0,
        pad_token_id: int | None = 0,
        mask_token_id: int | None = 1,
        cls_token_id: int | None = 2,
        unk_token_id: int | None = 3,
        adapter_rank: int | None = None,
        adapter_alpha: float = 32.0,
        adapter_targets: str = "all-linear",
        critic_layers: int | None = None,
        critic_rank: int | None = None,
        critic_alpha: float = 32.0,
        critic_mark: str = "embeddings",
        score_activation: str = "none",
        **kwargs,
    ):
        refuse_unknown_keys(AdaptedConfig, kwargs)
        self.backbone = {"model_type": "bert"} if backbone is None else backbone
        self.backbone_class = backbone_class
        self.backbone_config_class = backbone_config_class
        self.code_files = code_files or {}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.prefix_ids = list(prefix_ids or [])
        self.suffix_ids = list(suffix_ids or [])
        self.lm_head = lm_head
        self.shift_logits = shift_logits
        self.dropout = dropout
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.cls_token_id = cls_token_id
        self.unk_token_id = unk_token_id
        self.adapter_rank = adapter_rank
        self.adapter_alpha = adapter_alpha
        self.adapter_targets = adapter_targets
        self.critic_layers = critic_layers
        self.critic_rank = critic_rank
        self.critic_alpha = critic_alpha
        self.critic_mark = critic_mark
        self.score_activation = score_activation
        self.check()
        super().__init__(**kwargs)

    @property
    def is_causal(self) -> bool:
        """False: a token attends to earlier and to later ones."""
        return False

    def check(self) -> None:
        """Raise one ValueError that lists all values that no model can be built from."""
        problems = ConfigProblems(self)
        problems.integers(vocab_size=1, hidden_size=1, max_position_embeddings=1)
        if not problems.messages:
            problems.token_ids("pad", "mask", "cls", "unk")
        problems.need(
            isinstance(self.backbone, dict) and "model_type" in self.backbone,
            f"backbone must be a config with a model_type, got {self.backbone!r}",
        )
        problems.choice("lm_head", HEADS)
        problems.choice("critic_mark", MARKS)
        problems.choice("score_activation", SCORE_ACTIVATIONS)
        problems.probabilities("dropout")
        problems.critic_layers()
        for key in ("adapter_rank", "critic_rank"):
            rank = getattr(self, key)
            problems.need(rank is None or rank >= 1, f"{key} must be None or at least 1, got {rank!r}")
        problems.raise_if_any()


AdaptedConfig.register_for_auto_class()

__all__ = ["AdaptedConfig"]
