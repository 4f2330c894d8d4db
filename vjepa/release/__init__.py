"""The old place of `vjepa.weights` and `vjepa.export`, for scripts of version 0.1."""
