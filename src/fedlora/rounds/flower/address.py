"""Where a SuperLink listens."""

import ipaddress
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

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
