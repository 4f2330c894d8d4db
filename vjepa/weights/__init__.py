"""Read any trained model, ours or of other projects, and give it as a `WorldModel`."""
