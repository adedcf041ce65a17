"""`make gpu`, the cases of a GPU, and what is counted for one."""
