"""Length limits of models that read a text as a whole.

Inspectors, judges and rankers without prompts read every token of a candidate, because its label or reward belongs to
the whole text. A candidate longer than their context is refused as early as its length is known, before any training.
Language models read windows instead.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import durable
from lib.config import WITH_PROMPTS, Config
from lib.errors import BadData
from lib.sections.models import dependency_order

WHOLE_READERS = ("token_classifier", "sequence_scorer", "ranker")


@dataclass
class WholeTexts:
    """Counts texts that are longer than the context of a model.

    Attributes:
        model: its name in `models`.
        context: tokens that it reads, without [CLS].
        config: for the advice in the message.
        counts: number of tokens -> number of texts of this length.
        longest, name: tokens of the longest text, and id of its example.
    """

    model: str
    context: int
    config: Config
    counts: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    name: str = ""

    @classmethod
    def of(cls, config: Config) -> "WholeTexts | None":
        """Counter for the configured model with the shortest context; None if all candidates have prompts.

        Without such a model it counts, too, since one may be added before the stage is complete.
        """
        if config.candidates.source in WITH_PROMPTS:  # ranker.*_tokens limit what rankers with prompts read
            return None
        contexts = contexts_of(config)
        readers = {
            name: context
            for name, spec in config.models.items()
            if spec.mode in WHOLE_READERS and (context := contexts[name]) is not None
        }
        if not readers:
            return cls("", sys.maxsize, config)
        name = min(readers, key=lambda n: readers[n])
        return cls(name, readers[name], config)

    @property
    def total(self) -> int:
        """Number of texts counted."""
        return self.counts.total()

    @property
    def longer(self) -> int:
        """Number of texts that are longer than the context."""
        return sum(count for length, count in self.counts.items() if length > self.context)

    def add(self, table: pa.Table) -> "WholeTexts":
        """Count a table of examples or candidates (columns example_id, token_ids)."""
        lengths = pc.list_value_length(table["token_ids"]).to_numpy()
        sizes, counts = np.unique(lengths, return_counts=True)
        self.counts.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
        if len(lengths) and lengths.max() > self.longest:
            self.longest = int(lengths.max())
            self.name = table["example_id"][int(lengths.argmax())].as_py()
        return self

    def state(self) -> dict[str, Any]:
        """The counts, for `merge`. They do not depend on the context, which may change before a stage is complete."""
        return {"counts": sorted(self.counts.items()), "longest": self.longest, "name": self.name}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the counts of other texts, which come after these."""
        self.counts.update(dict(state["counts"]))
        if state["longest"] > self.longest:
            self.longest, self.name = state["longest"], state["name"]

    def problem(self) -> str | None:
        """What is wrong and what to do next; None if every text fits."""
        if not self.longer:
            return None
        shorter = max(1, self.config.data.passage_characters * self.context // self.longest)
        root = self.model
        while (start := self.config.models[root].start) in self.config.models:
            root = start
        from_scratch = (
            f" (models.{root}.architecture.context alone keeps stage 02 valid)" if start == "scratch" else ""
        )
        return (
            f"{self.longer:,} of {self.total:,} texts are longer than models.{self.model} reads, but their labels and "
            f"rewards belong to the whole text: {self.name} has {self.longest} tokens, the context is {self.context}. Set "
            f"architecture.context={self.longest} or more{from_scratch}, or data.passage_characters={shorter} or less, and "
            "run again from the first stage that this changes"
        )

    def refuse(self) -> None:
        """Raises BadData if a text is too long."""
        if problem := self.problem():
            raise BadData(problem)


def contexts_of(config: Config) -> dict[str, int | None]:
    """Name of each model -> tokens that it reads, without [CLS]. A model reads what its start reads.

    None if the folder that it starts from does not say.
    """
    found: dict[str, int | None] = {}
    for name in dependency_order(config.models):
        spec = config.models[name]
        if spec.start == "scratch":
            found[name] = spec.architecture.context
        elif spec.start == "02_generate_candidates":
            found[name] = config.generator.architecture.context
        elif spec.start in config.models:
            found[name] = found[spec.start]
        else:
            found[name] = _context_of_folder(Path(spec.start))
    return found


def _context_of_folder(folder: Path) -> int | None:
    """Context of a saved model; None for a missing or foreign folder, which loading the model reports."""
    try:
        content = durable.read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    positions = content.get("max_position_embeddings") if isinstance(content, dict) else None
    return positions - 1 if isinstance(positions, int) else None
