"""What frozen features are worth: probes and their baselines."""
