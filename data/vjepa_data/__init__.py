"""Video files to shards, shards to batches of uint8 frames. Knows no model and no cluster."""
