"""A run as a thing on disk: its folder, its checkpoints, how it is stopped and how it goes on."""
