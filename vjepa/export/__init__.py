"""Export a trained model for other programs, and verify the export."""
