"""FinQA: questions on pages of financial reports, answered by small programs; candidates are such programs."""
