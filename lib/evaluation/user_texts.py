"""Read the texts that a user gives to --score, as task text does, with their labels and groups where the file has them."""

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.errors import BadConfig, BadData, MissingInput, RemaskError
from lib.evaluation.run_models import roles_of
from lib.tasks import Document, Problem, get_task
from lib.tasks.text.check import check
from lib.user_files.faults import kind_of
from lib.user_files.folders import find_files
from lib.user_files.rows import read_rows

NO_LABEL = "no label"
LABEL_PROBLEMS = (NO_LABEL, "unknown class", "label not a number", "label not finite", "label out of range")
IGNORED = (
    "data.text_key",
    "data.id_key",
    "data.drop",
)  # the user's file may have other columns than the run's

# Settings under which every text is read whole. The minimum amounts are for training
READ_WHOLE: dict[str, Any] = {
    "min_document_characters": 1,
    "passage_characters": 1,
    "split": "contiguous",
    "fractions": {"train": 1.0},
    "deduplicate": "none",
    "label_key": None,
    "label_classes": None,
    "spans_key": None,
    "span_classes": None,
    "group_key": None,
}


@dataclass(frozen=True)
class UserTexts:
    """What a user gave to --score.

    Attributes:
        texts: (document id, text) of each document.
        problems: what could not be read, or was changed.
        files: the files that were read.
        synthetic: document id -> whether its label is that of a synthetic document, where the file has the run's label column.
        groups: document id -> its group, where the file has the run's column of groups.
    """

    texts: list[tuple[str, str]]
    problems: list[Problem]
    files: list[Path]
    synthetic: dict[str, bool]
    groups: dict[str, str]


def read_user_texts(config: Config, path: Path) -> UserTexts:
    """Read the texts of a file or folder, as task text does, whatever the run's task is.

    Raises:
        BadConfig: the run has no models that score text.
        BadData: no text is left.
        MissingInput: there is no such file or folder.
    """
    if config.critic.method != "token_critic" and not config.only_detects:
        raise BadConfig(
            f"--score needs critic.method token_critic, or labels beside the text; with {config.critic.method}, no model reads "
            "single tokens; --rank FILE ranks candidates by a trained ranker"
        )
    if config.only_detects and not any(
        roles_of(config)[role] for role in ("reference", "inspector", "judge")
    ):
        raise BadConfig(
            "--score needs a judge whose score says how synthetic a text is, an inspector or a reference model, and models has none of "
            "them"
        )
    if not path.exists():
        raise MissingInput(f"--score {path}: there is no such file or folder")
    # A file whose name begins with "builtin" is a file, not a text that the project ships
    name = os.path.join(".", path) if str(path).startswith("builtin") else str(path)
    changes = {"path": name, **READ_WHOLE}
    if _may_have(path, config.data.label_key):
        changes |= {key: getattr(config.data, key) for key in ("label_key", "label_classes")}
        if _may_have(path, config.data.group_key):
            changes["group_key"] = config.data.group_key
    config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    try:
        files, items = get_task("text").sources(config), list(check(config, keeps_unlabelled=True))
    except RemaskError as error:  # the message names the setting, but the user gave the flag
        raise type(error)(str(error).replace("data.path", "--score")) from None
    documents = [item for item in items if isinstance(item, Document)]
    texts = [
        (name, "".join(piece.content for piece in pieces))
        for name, pieces in itertools.groupby(documents, key=lambda document: document.document_id)
    ]
    problems = [
        p
        for p in items
        if isinstance(p, Problem) and p.kind not in ("too little text", "no group", *LABEL_PROBLEMS)
    ]
    problems += _of_labels([p for p in items if isinstance(p, Problem) and p.kind in LABEL_PROBLEMS])
    found = ((d.document_id, d.label) for d in documents if d.label is not None and not d.piece)
    named = config.data.label_classes is not None
    synthetic = {name: label != 0 if named else label < 1 for name, label in found}
    if not texts:
        raise BadData(f"--score {path}: there is no text to score")
    groups = {d.document_id: d.group for d in documents if d.group is not None}
    return UserTexts(texts, problems, files, synthetic, groups)


def _of_labels(problems: list[Problem]) -> list[Problem]:
    """One problem for all labels that cannot be used. A row without a label is none: only some may have one."""
    wrong = [p for p in problems if p.kind != NO_LABEL]
    if not wrong:
        return []
    found = f"{len(wrong):,} labels cannot be used, the first one {wrong[0].found}"
    advice = f"expected {wrong[0].expected}; these texts get scores, but do not count in the rates"
    return [replace(wrong[0], severity="warning", kind="label", found=found, advice=advice)]


def _may_have(path: Path, key: str | None) -> bool:
    """Whether rows of a file, or of one in a folder, may have a value under a key. The rows of a table have the columns of the first
    one that can be read.
    """
    if key is not None and path.is_dir():
        return any(_may_have(file, key) for file in find_files(path).files)
    if key is None or not path.is_file() or (kind := kind_of(path).removesuffix(".gz")) in ("", ".txt"):
        return False
    if kind in (".json", ".jsonl"):
        return True
    found = (row.value for row in read_rows(path, wanted=[key]) if isinstance(row.value, dict))
    return key in next(found, {})
