"""Triton server of a repository: environment, backends, process and containers.

with running_server("models", environment=environment_from_folder(folder)) as server:
    print(server.addresses.grpc)
"""

from __future__ import annotations

from runtime.server.environment import ServerEnvironment, default_folder, environment_from_folder
from runtime.server.process import Addresses, Server, ServerOptions, running_server

__all__ = [
    "Addresses",
    "Server",
    "ServerEnvironment",
    "ServerOptions",
    "default_folder",
    "environment_from_folder",
    "running_server",
]
