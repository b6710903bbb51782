"""The program of a rank that rank 0 starts on its machine: `python -m slipstream.engine.rank RANK SOCKET`.

It says that it lives before it imports torch, which may take seconds. RANK is for those who look at a list of processes.
"""

from __future__ import annotations

import socket
import sys

from slipstream.parallel.link import Link, obey


def main() -> None:
    link = Link(socket.socket(fileno=int(sys.argv[2])))
    said = link.first()
    if said is None:  # rank 0 is gone already
        return
    obey(link)
    from slipstream.engine.worker import serve

    serve(link, said)


if __name__ == "__main__":
    main()
