"""Whether the models that read a text as a whole can: a label or reward of the whole says nothing of its first part.

Inspectors, judges and rankers without prompts read each candidate from its first token to its last. A candidate that is
longer than their context is refused before anything is trained, as early as its length is known. Language models read
windows instead.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from lib.config import Config
from lib.errors import BadData

if TYPE_CHECKING:
    from lib.training.stage_inputs import StageInputs

WHOLE_READERS = ("token_classifier", "sequence_scorer", "ranker")


@dataclass
class WholeTexts:
    """Counts texts that a model does not read to their end.

    Attributes:
        model: its name in `models`; context: tokens that it reads, [CLS] aside.
        config: for advice.
        total, longer: texts seen, and those with more tokens; longest, name: the tokens of the longest and its example.
    """

    model: str
    context: int
    config: Config
    total: int = 0
    longer: int = 0
    longest: int = 0
    name: str = ""

    @classmethod
    def of(cls, config: Config) -> "WholeTexts | None":
        """For the model of the config that reads least of a text; None where none reads the examples' texts."""
        if (
            config.candidates.source == "programs"
        ):  # rankers read prompts and programs, within ranker.*_tokens
            return None
        contexts = contexts_of(config)
        readers = {
            name: context
            for name, spec in config.models.items()
            if spec.mode in WHOLE_READERS and (context := contexts[name]) is not None
        }
        if not readers:
            return None
        name = min(readers, key=lambda n: readers[n])
        return cls(name, readers[name], config)

    def add(self, table: pa.Table) -> "WholeTexts":
        """Looks at examples or candidates (columns example_id, token_ids)."""
        lengths = pc.list_value_length(table["token_ids"]).to_numpy()
        self.total += len(lengths)
        self.longer += int((lengths > self.context).sum())
        if len(lengths) and lengths.max() > self.longest:
            self.longest = int(lengths.max())
            self.name = table["example_id"][int(lengths.argmax())].as_py()
        return self

    def problem(self) -> str | None:
        """What is wrong and what to do; None if every text fits."""
        if not self.longer:
            return None
        shorter = max(1, self.config.data.passage_characters * self.context // self.longest)
        root = self.model
        while (start := self.config.models[root].start) in self.config.models:
            root = start
        own = (
            f" (models.{root}.architecture.context alone, if stage 02 is to stay)"
            if start == "scratch"
            else ""
        )
        return (
            f"{self.longer:,} of {self.total:,} texts are longer than models.{self.model} reads, but their labels and "
            f"rewards are of the whole: {self.name} has {self.longest} tokens, the context is {self.context}. Set "
            f"architecture.context={self.longest} or more{own}, or data.passage_characters={shorter} or less, and run again "
            "from the first stage that this changes"
        )

    def refuse(self) -> None:
        """Raises BadData if a text is too long."""
        if problem := self.problem():
            raise BadData(problem)


def contexts_of(config: Config) -> dict[str, int | None]:
    """Name of each model -> tokens that it reads, which are its start's; None where the start does not say."""
    found: dict[str, int | None] = {}
    for name, spec in config.models.items():
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
    """None where there is no such folder, or none of ours: whoever loads the model says so."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    positions = content.get("max_position_embeddings") if isinstance(content, dict) else None
    return positions - 1 if isinstance(positions, int) else None


def refuse_longer_candidates(config: Config, names: Iterable[str], stage_inputs: "StageInputs") -> None:
    """Raises BadData, before the first of the models is trained, if one of them cannot read a candidate whole."""
    contexts = contexts_of(config)
    for name in names:
        spec = config.models[name]
        with_prompts = spec.mode == "ranker" and stage_inputs.have_prompts
        if spec.mode not in WHOLE_READERS or with_prompts or contexts[name] is None:
            continue
        texts = WholeTexts(name, contexts[name] or 0, config)
        for split in (spec.split, "selection", "held_out"):
            texts.add(stage_inputs.candidates(split))
        texts.refuse()
