"""Tasks: all that stages 00 to 03 need to know about a kind of data. Stages 04 to 06 know no task.

A task is one module, `lib/tasks/<name>.py` or a package of that name, chosen by `task: <name>` in the config.
It has these functions:

    sources(config)                    -> the files it reads, for hashing
    check(config)                      -> Document | Problem, one after the other          (stage 00)
    prepare(config, documents)         -> Example | Dropped, one after the other           (stage 01);
                                          documents can be gone over more than once
    candidates(examples, context)      -> a table of schema.CANDIDATES for these examples  (stage 02)
    rewards(config, candidates)        -> (rewards in [0, 1], {name of term: values})      (stage 03)

and may have these:

    plan_candidates(tables, context)   -> what `candidates` needs to know of all examples first, kept in `context.plan`;
                                          the tables can be gone over more than once
    review_candidates(context)         -> (figures for the manifest, table of schema.BASELINES or None), when all are made;
                                          raises BadData when they must not be used
    explain(row)                       -> a few words about one result row, for the report
"""

import importlib
import pkgutil
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lib import randomness
from lib.config import Config
from lib.errors import BadConfig, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from lib.synthetic import MaskedLMEngine

SHORTENED = "part of the prompt"  # tag of an example whose prompt was too long to be kept whole
REQUIRED = ("sources", "check", "prepare", "candidates", "rewards")


@dataclass(frozen=True)
class Document:
    """One thing as it came: a text, or a record as JSON."""

    document_id: str
    content: str
    source: str


@dataclass(frozen=True)
class Problem:
    """Something wrong in the raw data. `error`: training would be wrong; `warning`: left out or mended."""

    severity: str
    kind: str
    source: str
    location: str
    found: str
    expected: str
    advice: str


@dataclass(frozen=True)
class Example:
    """One thing to learn from; see schema.EXAMPLES for the columns.

    `split`: train; selection, which chooses the best step of every model and must not be empty; held_out, which is
    reported; or another of schema.EXAMPLES. A group lies in one split as a whole.
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
    """What `prepare` left out, and why: kept, so that nothing vanishes."""

    example_id: str
    reason: str
    text: str


@dataclass
class CandidateContext:
    """What stage 02 lends a task: the tokenizer, keyed noise, and masked LMs where the config asks for them.

    `engines` holds one masked LM, or one per fold when cross-fitting; it is empty for other sources. `dropped` takes
    the examples for which there are no candidates, with the reason; `counts` takes what a person should know of the
    others, for the manifest. Of another `draw` the same examples get other candidates.
    """

    config: Config
    tokenizer: Any
    engines: "list[MaskedLMEngine]"
    plan: Any = None
    dropped: list[Dropped] = field(default_factory=list)
    draw: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def seed(self) -> int:
        """What all noise is keyed by."""
        seed = self.config.seed
        return randomness.key(seed, "draw", self.draw) if self.draw else seed

    def key(self, purpose: str) -> int:
        return randomness.key(self.seed, f"candidates {purpose}")

    @cached_property
    def same_tokenizer(self) -> bool:
        """Whether the masked LM reads the run's own tokens."""
        return bool(self.engines) and self.engines[0].tokenizer.get_vocab() == self.tokenizer.get_vocab()

    def draw_mask(
        self,
        eligible: "np.ndarray",
        ratio: "np.ndarray",
        rows: "np.ndarray",
        ends: "Callable[[], np.ndarray]",
    ) -> "np.ndarray":
        """(B, T) bool: the share `ratio[b]` of each row's eligible tokens, by the configured kind of masking.

        `ends`: () -> (B, T) bool, the tokens that end a line; asked only for masking by lines.
        """
        from lib.diffusion.masking import draw_mask, line_numbers, masked_counts

        counts = masked_counts(ratio, eligible.sum(1))
        masking, lines = self.config.candidates.masking, None
        if masking.type == "line":
            lines = line_numbers(ends())
        return draw_mask(masking, eligible, counts, self.key("mask"), rows, lines)

    @cached_property
    def newline_ids(self) -> "np.ndarray":
        """The run's own tokens that end a line."""
        from lib.tokenization import newline_ids

        return newline_ids(self.tokenizer)

    def fold_of(self, groups: list[str], splits: list[str]) -> "np.ndarray":
        """(N,) which engine rewrites each example: one that did not train on its group."""
        import numpy as np

        folds = len(self.engines)
        inside = [
            cross_fit_fold(self.config.seed, g, folds) if s == "train" else 0
            for g, s in zip(groups, splits, strict=True)
        ]
        return np.asarray(inside)


def cross_fit_fold(seed: int, group: str, folds: int) -> int:
    """The fold of a group; the generator of fold f does not train on the groups of fold f."""
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
            f"lib/tasks/{name} lacks {', '.join(missing)}; lib/tasks/__init__.py says what a task has"
        )
    return module
