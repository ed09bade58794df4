"""The model families as Hugging Face models: Remask GPT, LTG-BERT (Samuel et al. 2023), and backbones of other projects.

Each has a head class per mode. Importing this package registers the classes with the Auto classes of transformers. The
files beside this one are those that a saved folder carries; see `shared_configuration.py`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_adapted import AdaptedConfig
from .configuration_ltg_bert import LtgBertConfig
from .configuration_remask_gpt import RemaskGptConfig
from .modeling_adapted import (
    AdaptedForMaskedLM,
    AdaptedForSequenceClassification,
    AdaptedForTokenClassification,
    AdaptedPreTrainedModel,
)
from .modeling_ltg_bert import (
    LtgBertForMaskedLM,
    LtgBertForSequenceClassification,
    LtgBertForTokenClassification,
    LtgBertModel,
    LtgBertPreTrainedModel,
)
from .modeling_remask_gpt import (
    RemaskGptForCausalLM,
    RemaskGptForMaskedLM,
    RemaskGptForSequenceClassification,
    RemaskGptForTokenClassification,
    RemaskGptModel,
    RemaskGptPreTrainedModel,
)

_AUTO_CLASSES = {
    RemaskGptConfig: (
        (AutoModel, RemaskGptModel),
        (AutoModelForMaskedLM, RemaskGptForMaskedLM),
        (AutoModelForCausalLM, RemaskGptForCausalLM),
        (AutoModelForTokenClassification, RemaskGptForTokenClassification),
        (AutoModelForSequenceClassification, RemaskGptForSequenceClassification),
    ),
    LtgBertConfig: (
        (AutoModel, LtgBertModel),
        (AutoModelForMaskedLM, LtgBertForMaskedLM),
        (AutoModelForTokenClassification, LtgBertForTokenClassification),
        (AutoModelForSequenceClassification, LtgBertForSequenceClassification),
    ),
    AdaptedConfig: (
        (AutoModelForMaskedLM, AdaptedForMaskedLM),
        (AutoModelForTokenClassification, AdaptedForTokenClassification),
        (AutoModelForSequenceClassification, AdaptedForSequenceClassification),
    ),
}
for _config_class, _pairs in _AUTO_CLASSES.items():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _auto_class, _model_class in _pairs:
        _auto_class.register(_config_class, _model_class, exist_ok=True)

__all__ = [
    "AdaptedConfig",
    "AdaptedForMaskedLM",
    "AdaptedForSequenceClassification",
    "AdaptedForTokenClassification",
    "AdaptedPreTrainedModel",
    "LtgBertConfig",
    "LtgBertForMaskedLM",
    "LtgBertForSequenceClassification",
    "LtgBertForTokenClassification",
    "LtgBertModel",
    "LtgBertPreTrainedModel",
    "RemaskGptConfig",
    "RemaskGptForCausalLM",
    "RemaskGptForMaskedLM",
    "RemaskGptForSequenceClassification",
    "RemaskGptForTokenClassification",
    "RemaskGptModel",
    "RemaskGptPreTrainedModel",
]
