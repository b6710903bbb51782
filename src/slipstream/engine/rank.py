"""The program of a rank that rank 0 starts on its machine; its arguments end in `slipstream.engine.rank RANK SOCKET`.

It says that it lives before it imports torch, which may take seconds. RANK is for those who look at a list of processes.
"""

from __future__ import annotations

import socket
import sys

from slipstream.parallel.link import SILENCE, Link, obey


def main() -> None:
    link = Link(socket.socket(fileno=int(sys.argv[3])))
    said = link.first(SILENCE)
    if said is None:  # rank 0 is gone already, or hangs
        return
    obey(link)
    from slipstream.engine.worker import serve

    serve(link, said)
