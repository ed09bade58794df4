"""Executors: who makes the parts of tables. In this process, in several processes, or as actors of Ray.

    with open_executor(config.executor, work) as executor:
        for number in executor.make(missing):
            ...

A `Work` knows how to make part number n; an executor knows where that runs. All executors give the same bytes: a part is a
function of its number. A worker that is lost is replaced, and its part is made again.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lib.executors.base import Executor, Work
from lib.executors.local import LocalExecutor
from lib.executors.worker_processes import ProcessExecutor

if TYPE_CHECKING:
    from lib.sections.executor import ExecutorConfig

__all__ = ["Executor", "Work", "open_executor"]


def open_executor(settings: "ExecutorConfig", work: Work) -> AbstractContextManager[Executor]:
    """The executor of the config, for one work. Raises MissingInput or BadConfig if Ray cannot be used."""
    if work.only_here:
        return LocalExecutor(work)
    if settings.type == "processes":
        return ProcessExecutor(work, settings.workers)
    if settings.type == "ray":
        from lib.executors.ray_actors import RayExecutor

        return RayExecutor(work, settings.workers)
    return LocalExecutor(work)
