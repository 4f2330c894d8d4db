"""Methods: what is learned, and from what. One folder per method; see `vjepa.methods.base` for the contract."""
