"""Pages in one HTML file about a run, a model or a corpus."""
