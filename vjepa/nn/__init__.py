"""The networks: encoder, masked predictor, attentive probe, and their building blocks. No training code."""
