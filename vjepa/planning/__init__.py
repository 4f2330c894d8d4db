"""Planning with a world model: planners, worlds, and an evaluation in closed loop."""
