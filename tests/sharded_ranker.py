"""One of several processes that divide the frozen weights of a ranker. It writes what it saw to FOLDER/<rank>.json.

Jobs of `tests/processes.py` call `main` with the argument FOLDER.
"""

import ctypes
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

from lib.engine import processes
from lib.engine.allocator import release_free_memory
from lib.engine.sharding import is_sharded
from lib.models.encoders import with_lora
from lib.models.packing import Pools
from lib.models.ranker import CandidateRanker, HeadOptions
from lib.models.ranker_placement import on_device
from lib.runtime import Runtime
from lib.training.checkpoint import frozen_digest

SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 8}  # fmt: skip


def wide_ranker() -> tuple[CandidateRanker]:
    """96 million frozen weights in eight layers, nearly 400 MB."""
    torch.manual_seed(0)
    backbone = LlamaModel(LlamaConfig(**SHAPE))
    backbone.config._name_or_path = "wide"
    model = CandidateRanker(
        with_lora(backbone, 2, 4, 0.0, seed=0), head=HeadOptions(dropout=0.0), seed=0, packs=True
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return (model,)


def pools() -> Pools:
    ids = torch.arange(24)
    prompt, candidates = ids[None, :8], ids[8:].view(1, 2, 8)
    return Pools(prompt, torch.ones_like(prompt).bool(), candidates, torch.ones_like(candidates).bool())


def give_memory_back_at_once() -> None:
    """Let the C library keep no freed memory, so that the peak is that of memory in use."""
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    for option, value in ((m_trim_threshold, 2**17), (m_mmap_threshold, 2**17), (m_arena_max, 1)):
        ctypes.CDLL(None).mallopt(option, value)


def status(name: str) -> int:
    """Megabytes of this process: VmRSS, or the peak VmHWM."""
    release_free_memory()
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1024


def gradients(model: CandidateRanker) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pools()).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    folder = Path(sys.argv[1])
    give_memory_back_at_once()
    runtime = Runtime(torch.device("cpu"), "fp32", processes=processes.start())
    before, times = status("VmRSS"), list[float]()

    def load():
        times.append(time.time())
        loaded = wide_ranker()
        times.append(time.time())
        return loaded

    (model,) = on_device(load, True, runtime)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    seen: dict[str, Any] = {
        "before": before,
        "times": times,
        "after_load": status("VmRSS"),
        "sharded": is_sharded(model),
    }
    seen["own"] = sum(cast(Any, p).to_local().numel() for p in frozen) / sum(p.numel() for p in frozen)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    found = gradients(model)
    seen["peak"] = status("VmHWM")
    # Uneven numbers of items: the processes still call the model together
    seen["passes"] = 0

    def score(item: int) -> tuple[np.ndarray]:
        seen["passes"] += 1
        with torch.no_grad():
            return (model(pools()).numpy() + item,)

    results = [runtime.processes.share(score, list(range(n))) for n in (1, 3, 4)]
    digest = frozen_digest(model, found)
    # The whole ranker, in this process alone
    (whole,) = wide_ranker()
    expected = gradients(whole)
    with torch.no_grad():
        scores = whole(pools()).numpy()
    seen["equal_gradients"] = found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    seen["equal_scores"] = all(
        np.array_equal(row, scores + item) for shared in results for item, (row,) in enumerate(shared)
    )
    seen["equal_digest"] = digest == frozen_digest(whole, expected)
    (folder / f"{runtime.processes.rank}.json").write_text(json.dumps(seen))
    runtime.processes.close()
