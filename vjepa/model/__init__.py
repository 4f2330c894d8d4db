"""The old place of `vjepa.nn`, for scripts of version 0.1."""
