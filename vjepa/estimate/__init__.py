"""FLOPs, memory, communication and hours of a run, before it is queued."""
