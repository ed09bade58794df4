"""A training checkpoint: a folder that is either complete or absent, with hashes that reveal damage.

Weights, EMA and optimizer moments are safetensors; step, best value and sums are JSON. The folder also links the best
model of its step, because the one outside may be of a later step. `hashes.json` is written last, then the folder is
renamed into place. The previous checkpoint is removed after that.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import code_version, durable
from lib.engine.sharding import whole
from lib.errors import BadConfig, BadData
from lib.log import say

FOLDER = "checkpoint"


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


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(tensors, state) of the last checkpoint, None if there is none. Raises BadData that names a damaged file."""
    from safetensors.torch import load_file

    path = folder / FOLDER
    durable.recover_folder(path)
    if not path.exists():
        return None
    advice = "remove the checkpoint folder to train this model from the beginning"
    try:
        hashes = json.loads((path / "hashes.json").read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if durable.sha256_file(path / name) != expected:
                raise BadData(
                    f"{path / name} is damaged: its sha256 differs from the one in hashes.json; {advice}"
                )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        raise BadData(f"{path} is damaged ({error}); {advice}") from None
    names = [n.removesuffix(".safetensors") for n in hashes if n.endswith(".safetensors") and "/" not in n]
    return {n: load_file(str(path / f"{n}.safetensors")) for n in names}, state


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
