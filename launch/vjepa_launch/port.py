"""Choose the port on which the ranks of an attempt meet.

    python -m vjepa_launch.port     prints a port that is free on this node

The batch script runs this before srun on the first node, where rank 0 will run. All ranks inherit the port, so they
need no agreement over the network or the disk.
"""

import random
import socket

PORTS = range(15000, 30000)
"""Below 32768, where Linux begins to assign ports to outgoing connections."""


def free_port() -> int:
    """Return a random free port. Random, so that late processes of an earlier attempt connect to nothing."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port


if __name__ == "__main__":
    print(free_port())
