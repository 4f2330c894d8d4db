"""A corpus as it lies on a disk or in a store: tars, their table and manifest, and how a sample's bytes are reached."""
