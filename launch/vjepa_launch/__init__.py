"""Turn a run folder into processes on machines. This package knows no model and no data, and never imports torch."""
