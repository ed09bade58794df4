"""FinQA: questions on pages of financial reports, answered by small programs; K programs each, one of them right."""

from lib.tasks.finqa.candidates import candidates, plan_candidates, review_candidates
from lib.tasks.finqa.check import check, sources
from lib.tasks.finqa.examples import prepare
from lib.tasks.finqa.explain import explain
from lib.tasks.finqa.rewards import rewards

__all__ = [
    "candidates",
    "check",
    "explain",
    "plan_candidates",
    "prepare",
    "review_candidates",
    "rewards",
    "sources",
]
