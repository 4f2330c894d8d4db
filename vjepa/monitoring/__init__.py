"""Metrics, health checks and diagnostics of a running training."""
