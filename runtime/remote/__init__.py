"""The same encoder on a server: ``Encoder.open("grpc://HOST:PORT/NAME")``.

    encoder.py     RemoteEncoder: the interface of ``runtime.Encoder``, answered by a server
    served.py      what the server says of a model, and whether it is what was asked for
    calls.py       one request: retries, back-off, the embedding space checked again after a loss
    transport.py   gRPC and HTTP behind one small interface
    payloads.py    texts and images as the tensors of a request
    tensors.py     tensors as bytes
    shared.py      system shared memory, for a server on this machine
    options.py     addresses and connection options

Needs ``pip install 'babeltower[client]'``; nothing of it is imported before an address is opened.
"""

from __future__ import annotations

from runtime.remote.encoder import RemoteEncoder
from runtime.remote.options import Address, Connection, address_from_text

__all__ = ["Address", "Connection", "RemoteEncoder", "address_from_text"]
