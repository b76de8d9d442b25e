"""Certificates for the server and keys for the nodes: one folder on the server, two files for each node."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.deploy.credential import Credential
from fedlora.deploy.processes import make_private
from fedlora.errors import UserError

_YEARS = 2


@dataclass(frozen=True)
class Keys:
    """Folder of keys and certificates.

    ca.crt                       authority's certificate, by which nodes verify the server
    ca.key                       signing key; needed again only to renew the server's certificate
    server.crt, server.key       server's certificate and private key
    nodes/NAME.key               node's private key; needed by the node, not by the server
    nodes/NAME.pub, NAME.clients its public key and the clients that it may register, one per line; needed by the server
    """

    folder: Path

    @property
    def ca(self) -> Path:
        """Path of the authority's certificate."""
        return self.folder / "ca.crt"

    def nodes(self) -> list[Path]:
        """Public key files of the nodes that may connect."""
        return sorted((self.folder / "nodes").glob("*.pub"))

    def credentials(self) -> dict[bytes, Credential]:
        """Maps public keys, in the form in which Flower identifies nodes, to their credentials.

        Without a `.clients` file, a key is valid for the client of its own name.

        Raises:
            UserError: a file is not readable.
        """
        found = {}
        for path in self.nodes():
            try:
                key = serialization.load_ssh_public_key(path.read_bytes())
                pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
                found[pem] = Credential(path.stem, self._clients(path.stem))
            except (OSError, ValueError, UnsupportedAlgorithm) as error:
                raise UserError(f"{path}: is not a readable public key: {error}") from error
        return found

    def _clients(self, node: str) -> frozenset[str]:
        declared = self.folder / "nodes" / f"{node}.clients"
        return frozenset(declared.read_text(encoding="utf-8").splitlines()) if declared.exists() else frozenset({node})

    def superlink(self, host: str | None = None) -> list[str]:
        """Command-line options of the SuperLink; `host` is the address used by the server's own processes.

        Raises:
            UserError: a file is missing, or the certificate has expired or is not valid for that host.
        """
        needed = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
        for name in needed.values():
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder}: has no {name}; create it with: fedlora keys {self.folder} --host NAME")
        self._check_certificate(host)
        options = [word for option, name in needed.items() for word in (option, str((self.folder / name).resolve()))]
        return [*options, "--enable-supernode-auth"]

    def _check_certificate(self, host: str | None) -> None:
        path, again = self.folder / "server.crt", f"create a new one with: fedlora keys {self.folder} --host NAME"
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            raise UserError(f"{path}: is not a readable certificate: {error}; {again}") from error
        now, first, last = (
            datetime.datetime.now(datetime.UTC),
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
        )
        if not first <= now <= last:
            raise UserError(f"{path}: is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, today is {now:%Y-%m-%d}; {again}")
        if host is not None and _name(host) not in list(names):
            raise UserError(
                f"{path}: is not valid for {host}, on which the server listens; {again}, with one --host for each name"
            )

    def make_server(self, hosts: Sequence[str]) -> None:
        """Creates a certificate for these names or addresses and the loopback, and the authority if necessary.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            make_private(self.folder)
            authority, certificate = self._authority()
            key = ec.generate_private_key(ec.SECP384R1())
            names = [_name(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])]
            signed = (
                _builder(_subject(f"fedlora server {hosts[0]}"), certificate.subject, key.public_key())
                .add_extension(x509.SubjectAlternativeName(names), critical=False)
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
                .sign(authority, hashes.SHA384())
            )
            _write(self.folder / "server.key", _private(key, serialization.PrivateFormat.PKCS8))
            _write(self.folder / "server.crt", signed.public_bytes(serialization.Encoding.PEM), secret=False)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def make_node(self, name: str, clients: Sequence[str] = ()) -> Path:
        """Creates a node's key pair; returns the path of the private key, which only the node needs.

        The node may register only these clients; if omitted, the client of its own name.

        Raises:
            UserError: the name exists or is not a valid file name, or another key is valid for one of the clients.
        """
        clients = list(clients) or [name]
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise UserError(f"{name!r} is not a valid node name; use letters, digits, '-', '_' and '.'")
        path = self.folder / "nodes" / f"{name}.key"
        if path.exists() or path.with_suffix(".pub").exists():
            raise UserError(f"{path}: a key with this name already exists; revoke it by removing {name}.pub")
        if invalid := [client for client in clients if not client or len(client.splitlines()) != 1 or len(client) > 200]:
            raise UserError(f"{invalid[0]!r} is not a valid client name; use one line of at most 200 characters")
        for other in self.nodes():
            if shared := sorted(self._clients(other.stem) & set(clients)):
                raise UserError(f"client {shared[0]!r} already belongs to node {other.stem!r}; each client has one node")
        for folder in (self.folder, path.parent):
            make_private(folder)
        _write(path.with_name(f"{name}.clients"), "".join(f"{client}\n" for client in clients).encode())
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write(path, _private(key, serialization.PrivateFormat.OpenSSH))
        _write(path.with_name(f"{name}.pub"), public + b"\n", secret=False)
        return path

    def _authority(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        secret = self.folder / "ca.key"
        if secret.exists() and self.ca.exists():
            key = serialization.load_pem_private_key(secret.read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            return key, x509.load_pem_x509_certificate(self.ca.read_bytes())
        key = ec.generate_private_key(ec.SECP384R1())
        subject = _subject("fedlora authority")
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            _builder(subject, subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA384())
        )
        _write(secret, _private(key, serialization.PrivateFormat.PKCS8))
        _write(self.ca, certificate.public_bytes(serialization.Encoding.PEM), secret=False)
        return key, certificate


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, secret: bool = True) -> None:
    """Writes the file; a secret file is never readable by other users."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)
