"""Evaluations of frozen features, and the shell that runs them."""
