"""The rule of restarts under the name that it had in version 0.1, for scripts that ask it. It is now in `policy`."""

from vjepa_launch.policy import decide as decide
