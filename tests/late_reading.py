"""One of several processes of a tiny training that reads its losses late, as on a GPU. It writes to FOLDER.

Jobs of `tests/processes.py` call `main` with the argument FOLDER.
"""

import sys
from pathlib import Path

import torch

from lib.engine import processes
from lib.log import silence
from lib.runtime import Runtime
from lib.training import loop
from lib.training.step_terms import SETTLE_EVERY
from tests import trainings

PARTS = 4


def train(folder: Path) -> None:
    from tests.test_waits import model_of, objective_of

    training = trainings.settings(steps=SETTLE_EVERY + 7, evaluate_every=20, checkpoint_every=20, parts=PARTS)
    trainings.train_tiny(model_of("masked"), objective_of("masked", training), training, folder)


def main() -> None:
    group = processes.start()
    trainings.CPU = Runtime(torch.device("cpu"), "fp32", processes=group)
    if not group.is_main:
        silence()
    gpu, read, draw = torch.device("cuda"), loop.may_read_later, loop.may_draw_ahead
    loop.may_read_later = lambda device, objective: read(gpu, objective)
    loop.may_draw_ahead = lambda device, objective: draw(gpu, objective)
    train(Path(sys.argv[1]))
    group.close()
