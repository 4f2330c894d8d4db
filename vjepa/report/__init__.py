"""Pages in a single HTML file about a run, a model or a corpus."""
