"""The families of backbones, and everything that other modules use of them.

A family translates `architecture` into a Hugging Face config, has the head class of every mode, and names the tensors of the
backbone. A new family of backbones is added here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lib.models import hugging_face
from lib.sections.models import ArchitectureConfig


@dataclass(frozen=True)
class Family:
    """One kind of backbone.

    Attributes:
        name: the model type in a saved config. It is also the value of `architecture.family`, apart from that of
            pretrained backbones.
        config_of: (architecture, vocab_size, attention, keys of the head) -> its Hugging Face config; None if new weights
            of this family make no sense.
        heads: class per head: masked_lm, token, sequence, and causal_lm if the family has it.
        backbone: prefixes of the names of the backbone's tensors.
        shape: config keys that decide the tensors' shapes and meaning. A model that starts from a checkpoint keeps them.
        dropouts: config keys that `architecture.dropout` sets.
    """

    name: str
    config_class: type[PreTrainedConfig]
    config_of: Callable[..., PreTrainedConfig] | None
    heads: dict[str, type[PreTrainedModel]]
    backbone: tuple[str, ...]
    shape: tuple[str, ...]
    dropouts: tuple[str, ...]

    def restarted(self, source: PreTrainedConfig, dropout: float, **heads: Any) -> PreTrainedConfig:
        """The config of a model of another mode with the backbone of `source`."""
        values = source.to_dict()
        kept = {key: values[key] for key in (*self.shape, *_SPECIALS)}
        config = self.config_class(**kept, **dict.fromkeys(self.dropouts, dropout), **heads)
        config.name_or_path = source.name_or_path  # the folder of a backbone's own code
        return config


_SPECIALS = ("pad_token_id", "mask_token_id", "cls_token_id", "unk_token_id")
_OWN_IDS = dict(zip(_SPECIALS, range(4), strict=True))  # of tokenizers that stage 01 trains


def _remask_gpt(
    architecture: ArchitectureConfig, vocab_size: int, attention: str, **heads
) -> hugging_face.RemaskGptConfig:
    return hugging_face.RemaskGptConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_hidden_layers,
        num_attention_heads=architecture.num_attention_heads,
        intermediate_size=architecture.intermediate_size,
        max_position_embeddings=architecture.context + 1,  # one for [CLS]
        attention=attention,
        dropout=architecture.dropout,
        bias=architecture.bias,
        conv_width=architecture.conv_width,
        **_with_own_ids(heads),
    )


def _with_own_ids(heads: dict[str, Any]) -> dict[str, Any]:
    """The settings of the heads, and the special ids of this project's tokenizers where they name none."""
    return _OWN_IDS | heads


def _ltg_bert(
    architecture: ArchitectureConfig, vocab_size: int, attention: str, **heads
) -> hugging_face.LtgBertConfig:
    return hugging_face.LtgBertConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_hidden_layers,
        num_attention_heads=architecture.num_attention_heads,
        intermediate_size=architecture.intermediate_size
        or architecture.hidden_size * 8 // 3,  # as in the published sizes
        max_position_embeddings=architecture.context + 1,
        position_bucket_size=architecture.position_buckets,
        hidden_dropout_prob=architecture.dropout,
        attention_probs_dropout_prob=architecture.dropout,
        sep_token_id=None,
        **_with_own_ids(heads),
    )


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="remask_gpt",
            config_class=hugging_face.RemaskGptConfig,
            config_of=_remask_gpt,
            heads={
                "masked_lm": hugging_face.RemaskGptForMaskedLM,
                "causal_lm": hugging_face.RemaskGptForCausalLM,
                "token": hugging_face.RemaskGptForTokenClassification,
                "sequence": hugging_face.RemaskGptForSequenceClassification,
            },
            backbone=("model.",),
            shape=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                   "max_position_embeddings", "bias", "conv_width", "rope_theta", "logit_softcap", "rms_norm_eps",
                   "tie_word_embeddings"),
            dropouts=("dropout",),
        ),
        Family(
            name="ltg_bert",
            config_class=hugging_face.LtgBertConfig,
            config_of=_ltg_bert,
            heads={
                "masked_lm": hugging_face.LtgBertForMaskedLM,
                "token": hugging_face.LtgBertForTokenClassification,
                "sequence": hugging_face.LtgBertForSequenceClassification,
            },
            backbone=("embedding.", "transformer."),
            shape=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                   "max_position_embeddings", "position_bucket_size", "layer_norm_eps", "tie_word_embeddings"),
            dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        ),
        Family(
            name="remask_adapted",
            config_class=hugging_face.AdaptedConfig,
            config_of=None,  # lib.models.pretrained opens the model
            heads={
                "masked_lm": hugging_face.AdaptedForMaskedLM,
                "token": hugging_face.AdaptedForTokenClassification,
                "sequence": hugging_face.AdaptedForSequenceClassification,
            },
            backbone=("backbone.",),
            shape=("backbone", "backbone_class", "backbone_config_class", "code_files", "vocab_size", "hidden_size",
                   "max_position_embeddings", "prefix_ids", "suffix_ids", "lm_head", "shift_logits"),
            dropouts=("dropout",),
        ),
    )
}  # fmt: skip
PRETRAINED = "pretrained"  # value of `architecture.family` for a backbone of another project
