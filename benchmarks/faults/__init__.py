"""Fault injection: forked stages that are killed, fed with hostile files, or lose their power. See docs/reliability.md."""
