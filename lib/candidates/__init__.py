"""Candidates and rewards of stages 02 and 03, independent of the task."""
