"""Names of the clients' folders."""

from urllib.parse import quote


def client_folder(client: str) -> str:
    """Valid folder name for a client's id, which may have any characters."""
    return quote(client, safe=" ").replace(".", "%2E")
