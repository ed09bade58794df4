"""What each mode learns: its batches, its loss in named terms, its held-out metrics beside a baseline."""
