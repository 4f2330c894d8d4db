"""Methods of self-supervised learning, with a folder for each. `vjepa.methods.base` has the contract."""
