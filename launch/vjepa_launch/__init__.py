"""A run folder to processes on machines. Knows no model and no data, and never imports torch."""
