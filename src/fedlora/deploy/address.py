"""Where a SuperLink listens."""

import ipaddress
import socket
from dataclasses import dataclass

from fedlora.errors import UserError


@dataclass(frozen=True)
class Address:
    """A host and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """HOST:PORT.

        Raises:
            UserError: it is not that.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{text!r} is no address; expected HOST:PORT, for example server.example.org:9092")
        return cls(host.strip("[]"), int(port))

    @property
    def loopback(self) -> bool:
        """Whether it can only be reached from this machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def here(self) -> "Address":
        """Where this machine's own processes reach a server that listens there."""
        return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)

    def listen(self) -> socket.socket:
        """A socket that listens there. It is this process's from now on: no other one can have the port.

        Raises:
            UserError: the port is taken, or the address is not one of this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that are being closed
            listening.bind((self.host, self.port))
            listening.listen(2048)
        except OSError as error:
            listening.close()
            raise UserError(f"cannot listen on {self}: {error.strerror or error}; choose another with --listen") from None
        return listening

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
