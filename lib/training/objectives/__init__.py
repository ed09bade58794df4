"""The objective of each mode: its batches, its loss and its metrics, compared with a trivial baseline."""
