"""A training checkpoint: a folder that is either complete or absent, with hashes that reveal damage.

Weights, EMA and optimizer moments are safetensors; step, best value and sums are JSON. The folder also links the best
model of its step, because the one outside may be of a later step. `hashes.json` is written last, then the folder is
renamed into place. The previous checkpoint is removed after that.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import code_version, durable, room
from lib.engine.sharding import whole
from lib.errors import BadConfig, BadData
from lib.log import say
from lib.runs import is_inside

FOLDER = "checkpoint"
KINDS_OF_STATE = {
    "step": int, "best_step": int, "summed_steps": int, "metrics_bytes": int, "best_metrics": dict, "sums": dict,
}  # fmt: skip


def save(
    folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], best: Path | None = None
) -> None:
    """Write `<folder>/checkpoint`: one safetensors file per entry of `tensors`, state.json, and a copy of `best`."""
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


def check_room(folder: Path, model: nn.Module, with_ema: bool, label: str) -> None:
    """Say what a training has on the disk at most. Raises CannotWrite if the disk has less.

    That is the best and the final model, and two checkpoints. A checkpoint has the weights that learn, their EMA and two moments;
    the old one is there until the new one is complete.
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    learning = sum(size for size, learns in sizes if learns)
    needed = 2 * sum(size for size, _ in sizes) + 2 * (3 + with_ema) * learning
    room.check_room(folder, needed, f"the training of {label}")


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(tensors, state) of the last checkpoint, None if there is none. Raises BadData that names a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / FOLDER
    durable.recover_folder(path)
    if not path.exists():
        return None
    advice = "remove the checkpoint folder to train this model from the beginning"
    try:
        hashes = durable.read_json(path / "hashes.json")
        for name, expected in hashes.items():
            if not is_inside(path / name, path):
                raise BadData(f"{path / 'hashes.json'} names a file outside of its folder: {name}; {advice}")
            if durable.sha256_file(path / name) != expected:
                raise BadData(
                    f"{path / name} is damaged: its sha256 differs from the one in hashes.json; {advice}"
                )
        state = durable.read_json(path / "state.json")
        names = [
            n.removesuffix(".safetensors") for n in hashes if n.endswith(".safetensors") and "/" not in n
        ]
        tensors = {n: load_file(str(path / f"{n}.safetensors")) for n in names}
    except (OSError, ValueError, AttributeError, TypeError, SafetensorError) as error:
        raise BadData(f"{path} is damaged ({error}); {advice}") from None
    wrong = [
        k
        for k, kind in KINDS_OF_STATE.items()
        if not isinstance(state, dict) or not _is_of(state.get(k), kind)
    ]
    if wrong:
        raise BadData(f"{path / 'state.json'} is damaged ({wrong[0]} is missing or wrong); {advice}")
    return tensors, state


def check_step(step: int, steps: int, folder: Path) -> None:
    """Raises BadData if a checkpoint is of a later step than the last one."""
    if step > steps:
        raise BadData(
            f"{folder / FOLDER} is of step {step}, but the training has {steps} steps; remove the checkpoint folder to train "
            "this model from the beginning"
        )


def check_tensors(
    saved: Mapping[str, Mapping[str, Tensor]], now: Mapping[str, Mapping[str, Tensor]], folder: Path
) -> None:
    """Raises BadData unless the tensors of a checkpoint are those of the model: names and shapes, group by group.

    Moments of the optimizer, `<weight>/<moment>`, must belong to weights. There are none before the first step alone.
    """
    for group, tensors in now.items():
        found = {name: tuple(value.shape) for name, value in saved.get(group, {}).items()}
        wanted = {name: tuple(value.shape) for name, value in tensors.items()}
        differing = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        if differing:
            raise BadData(
                f"{folder / FOLDER / group}.safetensors does not fit the model: {len(differing)} tensors differ, such as "
                f"{differing[0]}; remove the checkpoint folder to train this model from the beginning"
            )
    owners = {name.rpartition("/")[0] for name in saved.get("optimizer", {})}
    if not owners or not owners <= set(now["weights"]):
        raise BadData(
            f"{folder / FOLDER}: the moments of the optimizer are missing or belong to another model; remove the checkpoint "
            "folder to train this model from the beginning"
        )


def _is_of(value: Any, kind: type) -> bool:
    """Whether a value of state.json has a type; numbers must not be negative."""
    return isinstance(value, kind) and not isinstance(value, bool) and not (kind is int and value < 0)


def restore_folder(folder: Path, name: str) -> None:
    """Replace `<folder>/<name>` by the checkpoint's folder of that name, if the checkpoint has one."""
    kept = folder / FOLDER / name
    if kept.exists():
        with durable.replacing_folder(folder / name) as temporary:
            durable.link_folder(kept, temporary)


def check_fingerprint(
    saved: dict[str, Any], now: dict[str, Any], allow_inexact: bool, label: str, folder: Path
) -> None:
    """Refuse to continue with another torch, thread count, precision or code: results would not be the same to the bit.

    Args:
        saved, now: `Runtime.fingerprint`, with the hashes of the code files as `code`.
        folder: folder of the model; the message names it.

    Raises BadConfig, unless `allow_inexact` is set.
    """
    differing = [f"{k}: {saved.get(k)} -> {now[k]}" for k in now if k != "code" and saved.get(k) != now[k]]
    if changed := code_version.changed_files(saved.get("code", {}), now.get("code", {})):
        differing.append(f"changed code: {code_version.name_files(changed)}")
    if differing and not allow_inexact:
        raise BadConfig(
            f"{label} was started in another environment ({'; '.join(differing)}), so continuing would not give the same "
            f"bits; set training.allow_inexact_resume=true to continue anyway, or remove {folder} to train it from the "
            "beginning"
        )
    if differing:
        say(
            f"{label}: continuing in another environment ({'; '.join(differing)}): allow_inexact_resume is true"
        )


def frozen_digest(model: nn.Module, trained: Iterable[str]) -> str:
    """Hash of all weights except those named in `trained`. Checkpoints do not store frozen weights."""
    trained, digest = set(trained), hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if name not in trained:
            data = whole(tensor.detach()).cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_frozen(saved: str | None, now: str, label: str) -> None:
    """Raises BadData if the frozen weights are not those that the training started with."""
    if saved not in (None, now):
        raise BadData(
            f"{label}: the frozen weights are not those that this training started with; restore the encoder or the start "
            "that they came from, or pass --overwrite"
        )
