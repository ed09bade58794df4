"""The task `text`: passages of documents, rewritten by a masked LM and rewarded for being authentic."""

from lib.tasks.text.check import check
from lib.tasks.text.passages import prepare
from lib.tasks.text.raw import sources
from lib.tasks.text.rewriting import candidates, explain, review_candidates, rewards

__all__ = ["candidates", "check", "explain", "prepare", "review_candidates", "rewards", "sources"]
