"""Address on which a SuperLink listens."""

import ipaddress
import socket
from dataclasses import dataclass

from fedlora.errors import UserError


@dataclass(frozen=True)
class Address:
    """Host and port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parses HOST:PORT.

        Raises:
            UserError: `text` is not a valid address.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{text!r} is not a valid address; expected HOST:PORT, for example server.example.org:9092")
        return cls(host.strip("[]"), int(port))

    @property
    def loopback(self) -> bool:
        """Whether the address is reachable from this machine only."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def here(self) -> "Address":
        """Address at which processes of this machine connect to a server that listens on this one."""
        return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)

    def listen(self) -> socket.socket:
        """Opens a socket that listens on the address, and thereby reserves the port for this process.

        Raises:
            UserError: the port is in use, or the address does not belong to this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # despite connections in TIME_WAIT
            listening.bind((self.host, self.port))
            listening.listen(2048)
        except OSError as error:
            listening.close()
            raise UserError(
                f"cannot listen on {self}: {error.strerror or error}; choose another address with --listen"
            ) from None
        return listening

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
