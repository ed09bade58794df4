"""Who makes the parts of tables: the section `executor`. It changes no result."""

from typing import Literal

from lib.sections.base import Positive, Section


class ExecutorConfig(Section):
    type: Literal["local", "processes", "ray"]
    workers: Positive
