"""What a run needs: FLOPs, memory, communication and hours, before it is queued."""
