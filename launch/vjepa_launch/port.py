"""The port on which the ranks of an attempt meet.

    python -m vjepa_launch.port     prints one that is free on this node

The batch script runs this on the first node, which is that of rank 0, before srun: all ranks inherit the answer, and
nothing has to be agreed on over the network or the disk.
"""

import random
import socket

PORTS = range(15000, 30000)
"""Below 32768, where Linux takes the ports of outgoing connections from."""


def free_port() -> int:
    """Draw a port until nobody has it. A ghost of an earlier attempt that still calls at its port meets nobody."""
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
