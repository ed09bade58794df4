"""FinQA: questions on pages of financial reports. Each question has K candidate programs, of which one is right."""

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
