"""A port for the processes that a test starts."""

import socket


def free_port() -> int:
    """One that nobody listens on now; the system deals them out at random, so tests side by side get different ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
