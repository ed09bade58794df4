"""How stages 02 and 03 make candidates and rewards, whatever the task."""
