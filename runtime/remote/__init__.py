"""Client for an encoder on a server: ``Encoder.open("grpc://HOST:PORT/NAME")``.

    encoder.py     RemoteEncoder: the interface of ``runtime.Encoder``, answered by a server
    served.py      description of a served model, and its check against the requested one
    calls.py       requests with retries, back-off and a repeated space check after a lost connection
    transport.py   gRPC and HTTP behind one small interface
    payloads.py    texts and images as the tensors of a request
    tensors.py     tensors as bytes
    shared.py      system shared memory, for a server on this machine
    options.py     addresses and connection options

Needs ``pip install 'babeltower[client]'``; its libraries are imported only when an address is opened.
"""

from __future__ import annotations

from runtime.remote.encoder import RemoteEncoder
from runtime.remote.options import Address, Connection, address_from_text

__all__ = ["Address", "Connection", "RemoteEncoder", "address_from_text"]
