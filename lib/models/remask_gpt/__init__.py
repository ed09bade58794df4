"""The Remask GPT backbone: one transformer backbone, bidirectional or causal, with a head class per mode.

Importing this package registers the classes with the Auto classes of transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_remask_gpt import RemaskGptConfig
from .modeling_remask_gpt import (
    RemaskGptForCausalLM,
    RemaskGptForMaskedLM,
    RemaskGptForSequenceClassification,
    RemaskGptForTokenClassification,
    RemaskGptModel,
    RemaskGptPreTrainedModel,
)

AutoConfig.register(RemaskGptConfig.model_type, RemaskGptConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, RemaskGptModel),
    (AutoModelForMaskedLM, RemaskGptForMaskedLM),
    (AutoModelForCausalLM, RemaskGptForCausalLM),
    (AutoModelForTokenClassification, RemaskGptForTokenClassification),
    (AutoModelForSequenceClassification, RemaskGptForSequenceClassification),
):
    _auto_class.register(RemaskGptConfig, _model_class, exist_ok=True)

__all__ = [
    "RemaskGptConfig",
    "RemaskGptForCausalLM",
    "RemaskGptForMaskedLM",
    "RemaskGptForSequenceClassification",
    "RemaskGptForTokenClassification",
    "RemaskGptModel",
    "RemaskGptPreTrainedModel",
]
