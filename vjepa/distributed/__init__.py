"""Many ranks, one run: the process group, and networks sharded over it."""
