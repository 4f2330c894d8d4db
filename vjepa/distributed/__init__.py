"""The process group of a run, and networks sharded over it."""
