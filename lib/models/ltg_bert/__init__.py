"""Checkpoints of the LTG-BERT reference implementation (Samuel et al. 2023) as the Hugging Face models of this project.

`load_reference` takes a state dict; `python -m lib.models.ltg_bert CHECKPOINT OUT_DIR` converts a file.
"""

from .conversion import load_reference

__all__ = ["load_reference"]
