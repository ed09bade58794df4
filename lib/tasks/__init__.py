"""Tasks: everything that is specific to a kind of data, for stages 00 to 03. Stages 04 to 06 are the same for all tasks.

A task is one module, `lib/tasks/<name>.py` or a package of that name. `task: <name>` in the config selects it. It has
these functions:

    sources(config)                    -> the files that it reads, for hashing
    check(config)                      -> iterator of Document | Problem                   (stage 00)
    prepare(config, documents)         -> iterator of Example | Dropped                    (stage 01);
                                          `documents` can be iterated over several times
    candidates(examples, context)      -> a table of schema.CANDIDATES for these examples  (stage 02)
    rewards(config, candidates)        -> (rewards in [0, 1], {name of term: values})      (stage 03)

and may have these:

    plan_candidates(tables, context)   -> data about all examples for `candidates`, stored in `context.plan`;
                                          the tables can be iterated over several times
    review_candidates(context)         -> (figures for the manifest, table of schema.BASELINES or None), called after the
                                          last candidate; raises BadData if the candidates must not be used
    explain(row)                       -> a short explanation of one result row, for the report
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lib import randomness
from lib.config import Config
from lib.errors import BadConfig, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    import pyarrow as pa

    from lib.synthetic import MaskedLMEngine

SHORTENED = "part of the prompt"  # tag of an example whose prompt was shortened
REQUIRED = ("sources", "check", "prepare", "candidates", "rewards")


@dataclass(frozen=True)
class Document:
    """One document of the raw data: a text, or a record as JSON.

    A long text is several of these in a row, which differ in `piece`: 0, 1, 2 and so on. Together they are the text.

    Attributes:
        group: documents of one group stay in one split. None: a group of its own.
        label: of the whole document, a score or the number of a class. None without data.label_key.
        spans: {"start", "end", "class"} of the labelled parts, in characters of the document. None without data.spans_key.
    """

    document_id: str
    content: str
    source: str
    piece: int = 0
    group: str | None = None
    label: float | None = None
    spans: list[dict[str, int]] | None = None


@dataclass(frozen=True)
class Problem:
    """A problem in the raw data. `severity` is error if training would be wrong; warning if it was left out or corrected."""

    severity: str
    kind: str
    source: str
    location: str
    found: str
    expected: str
    advice: str


def problem_lines(problems: Iterable[Problem], most: int = 5) -> Iterator[str]:
    """A line for the first `most` problems of each kind, and how many more there are."""
    counts: Counter[str] = Counter()
    for p in problems:
        counts[p.kind] += 1
        if counts[p.kind] <= most:
            yield f"{p.source} {p.location}: {p.kind}: {p.found}; expected {p.expected}; {p.advice}"
    for kind, count in counts.items():
        if count > most:
            yield f"{kind}: {count - most:,} more"


@dataclass(frozen=True)
class Example:
    """One example; see schema.EXAMPLES for the columns.

    `split` is one of those in schema.EXAMPLES. `train` is learned; `selection` chooses the best step of every model and must
    not be empty; `held_out` is reported. A group is never divided between splits.
    """

    example_id: str
    prompt: str
    target: str
    split: str
    group: str
    continues: bool = False
    record: str | None = None
    tags: list[str] | None = None


@dataclass(frozen=True)
class Dropped:
    """Something that `prepare` left out, with the reason."""

    example_id: str
    reason: str
    text: str


@dataclass
class CandidateContext:
    """What stage 02 provides to a task.

    Attributes:
        engines: masked LMs if the config asks for them: one, or one per fold when cross-fitting.
        plan: what the task's `plan_candidates` returned.
        dropped: the task adds examples without candidates here, with the reason.
        draw: another number gives the same examples other candidates.
        counts: the task adds figures for the manifest here.
        examples: tables of all examples that get candidates, for `review_candidates`; can be iterated over several times.
    """

    config: Config
    tokenizer: Any
    engines: "list[MaskedLMEngine]"
    plan: Any = None
    dropped: list[Dropped] = field(default_factory=list)
    draw: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: "Iterable[pa.Table] | None" = None

    @property
    def seed(self) -> int:
        """The seed of all random draws."""
        seed = self.config.seed
        return randomness.key(seed, "draw", self.draw) if self.draw else seed

    def key(self, purpose: str) -> int:
        return randomness.key(self.seed, f"candidates {purpose}")

    @cached_property
    def same_tokenizer(self) -> bool:
        """Whether the masked LM has the vocabulary of the run's tokenizer."""
        return bool(self.engines) and self.engines[0].has_vocabulary_of(self.tokenizer)

    def draw_mask(
        self,
        eligible: "np.ndarray",
        ratio: "np.ndarray",
        rows: "np.ndarray",
        ends: "Callable[[], np.ndarray]",
    ) -> "np.ndarray":
        """(B, T) bool, the tokens to mask: a fraction `ratio[b]` of the eligible tokens of row b, by candidates.masking.

        `ends`: () -> (B, T) bool, the tokens that end a line; called only for masking by lines.
        """
        from lib.diffusion.masking import draw_mask, line_numbers, masked_counts

        counts = masked_counts(ratio, eligible.sum(1))
        masking, lines = self.config.candidates.masking, None
        if masking.type == "line":
            lines = line_numbers(ends())
        return draw_mask(masking, eligible, counts, self.key("mask"), rows, lines)

    @cached_property
    def newline_ids(self) -> "np.ndarray":
        """Ids of the tokens that end a line, in the run's tokenizer."""
        from lib.tokenization import newline_ids

        return newline_ids(self.tokenizer)

    def fold_of(self, groups: list[str], splits: list[str]) -> "np.ndarray":
        """(N,) index of the engine that rewrites each example: one that was not trained on its group."""
        import numpy as np

        folds = len(self.engines)
        engine_of = [
            cross_fit_fold(self.config.seed, g, folds) if s == "train" else 0
            for g, s in zip(groups, splits, strict=True)
        ]
        return np.asarray(engine_of)


def cross_fit_fold(seed: int, group: str, folds: int) -> int:
    """The fold of a group. The generator of fold f is not trained on the groups of fold f."""
    return int(randomness.hash_fraction(seed, "fold", group) * folds) if folds > 1 else 0


def get_task(name: str) -> ModuleType:
    """The module of a task. Raises BadConfig for an unknown name or a module that lacks a function."""
    known = [m.name for m in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise BadConfig(f"task: '{name}' is not in lib/tasks/{did_you_mean(name, known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    missing = [f for f in REQUIRED if not callable(getattr(module, f, None))]
    if missing:
        raise BadConfig(
            f"lib/tasks/{name} lacks {', '.join(missing)}; lib/tasks/__init__.py lists the functions of a task"
        )
    return module
