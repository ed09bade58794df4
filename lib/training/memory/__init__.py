"""How many bytes a training needs, from its config alone: `python -m lib.training.memory --config FILE`."""
