"""Ports for servers that are started a while after their port was chosen."""

import random
import socket


def free_port() -> int:
    """Of this machine. It is none of those that the system gives to others meanwhile (from 32768 on)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody answers
                return port
