"""A training checkpoint: a folder of safetensors and JSON that is whole or not there, and says if it is damaged.

weights, running mean and moments are tensors; step, best value and sums are JSON. The best model of that step lies
beside them, as links to the same bytes: the one outside may be of a later step. `hashes.json` comes last, then one
rename. The older checkpoint goes away only after that.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lib import durable
from lib.errors import BadConfig, BadData

FOLDER = "checkpoint"


def save(
    folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], best: Path | None = None
) -> None:
    """Write `<folder>/checkpoint` with one safetensors file per entry of `tensors`, and the folder `best` in it."""
    from safetensors.torch import save_file

    with durable.replacing_folder(folder / FOLDER) as temporary:
        for name, group in tensors.items():
            contiguous = {k: v.detach().to("cpu").contiguous() for k, v in group.items()}
            save_file(contiguous, str(temporary / f"{name}.safetensors"))
        (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        if best is not None:
            durable.link_folder(best, temporary / best.name)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        hashes = {p.relative_to(temporary).as_posix(): durable.sha256_file(p) for p in files}
        (temporary / "hashes.json").write_text(json.dumps(hashes, indent=2), encoding="utf-8")


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(tensors, state) of the last checkpoint, None if there is none. Raises BadData naming a damaged file."""
    from safetensors.torch import load_file

    path = folder / FOLDER
    durable.recover_folder(path)
    if not path.exists():
        return None
    advice = "remove the checkpoint folder to train this model from its start, or pass --overwrite"
    try:
        hashes = json.loads((path / "hashes.json").read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if durable.sha256_file(path / name) != expected:
                raise BadData(f"{path / name} is damaged: its sha256 is not the recorded one; {advice}")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        raise BadData(f"{path} is damaged ({error}); {advice}") from None
    names = [n.removesuffix(".safetensors") for n in hashes if n.endswith(".safetensors") and "/" not in n]
    return {n: load_file(str(path / f"{n}.safetensors")) for n in names}, state


def restore_folder(folder: Path, name: str) -> None:
    """Put the folder `name` that the checkpoint holds in the place of `<folder>/<name>`; nothing where it has none."""
    kept = folder / FOLDER / name
    if kept.exists():
        with durable.replacing_folder(folder / name) as temporary:
            durable.link_folder(kept, temporary)


def check_fence(saved: dict[str, Any], now: dict[str, Any], allow_inexact: bool, label: str) -> None:
    """Refuse to continue under another torch, thread count or precision: the bits would differ."""
    differing = [f"{k}: {saved.get(k)} -> {now[k]}" for k in now if saved.get(k) != now[k]]
    if differing and not allow_inexact:
        raise BadConfig(
            f"{label} was begun elsewhere ({'; '.join(differing)}), so continuing would not give the same bits; "
            "set training.allow_inexact_resume=true to go on all the same, or pass --overwrite"
        )
