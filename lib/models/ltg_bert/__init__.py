"""LTG-BERT (Samuel et al. 2023) as Hugging Face models, equal to the reference implementation.

Importing this package registers the classes with the Auto classes of transformers. `load_reference` takes a state
dict of the reference implementation; `python -m lib.models.ltg_bert CHECKPOINT OUT_DIR` converts a file of it.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_ltg_bert import LtgBertConfig
from .conversion import load_reference
from .modeling_ltg_bert import (
    LtgBertForMaskedLM,
    LtgBertForSequenceClassification,
    LtgBertForTokenClassification,
    LtgBertModel,
    LtgBertPreTrainedModel,
)

AutoConfig.register(LtgBertConfig.model_type, LtgBertConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, LtgBertModel),
    (AutoModelForMaskedLM, LtgBertForMaskedLM),
    (AutoModelForTokenClassification, LtgBertForTokenClassification),
    (AutoModelForSequenceClassification, LtgBertForSequenceClassification),
):
    _auto_class.register(LtgBertConfig, _model_class, exist_ok=True)

__all__ = [
    "LtgBertConfig",
    "LtgBertForMaskedLM",
    "LtgBertForSequenceClassification",
    "LtgBertForTokenClassification",
    "LtgBertModel",
    "LtgBertPreTrainedModel",
    "load_reference",
]
