"""The network: pixels to tokens, tokens to features, features to a guess of what is hidden."""
