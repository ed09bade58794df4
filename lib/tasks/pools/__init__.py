"""Pools: prompts with candidates and rewards of the user's own, in any of the usual layouts."""

from lib.tasks.pools.candidates import candidates, rewards
from lib.tasks.pools.check import check
from lib.tasks.pools.examples import prepare
from lib.tasks.pools.reading import sources
from lib.tasks.pools.review import review_candidates

__all__ = ["candidates", "check", "prepare", "review_candidates", "rewards", "sources"]
