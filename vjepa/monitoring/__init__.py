"""What is known about a run while it goes: what is recorded, and when it must not simply go on."""
