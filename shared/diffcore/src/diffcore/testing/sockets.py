"""Sockets as files: something that is no regular file, and that nothing waits for, as reading a pipe would."""

import os
import socket
from pathlib import Path


def make_socket(path: Path) -> None:
    """Leaves the file of a socket that nobody listens at."""
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)
