"""Socket files, which are no regular files and, unlike pipes, make no reader wait."""

import os
import socket
from pathlib import Path


def make_socket(path: Path) -> None:
    """Makes the file of a socket that no process listens to."""
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)
