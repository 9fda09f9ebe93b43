"""Redis servers that speak TLS, and the authority that signs their certificates."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlencode

import redis
from servers import RedisServer, require

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
NAMES = ["-addext", "subjectAltName=DNS:localhost"]

# From Python 3.13 a certificate is refused that does not say what it may be used for, as RFC 5280
# asks of authorities.
USE = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]


class Authority:
    """Signs certificates, all of them in one folder, with the openssl command."""

    def __init__(self, folder: Path, name: str) -> None:
        require("openssl", shutil.which("openssl"))
        self._folder = folder
        self._name = name
        self._request(name, "-x509", *USE, "-days", "2", "-out", f"{name}.crt")

    @property
    def certificate(self) -> Path:
        """The certificate that a peer has to trust."""
        return self._folder / f"{self._name}.crt"

    def sign(self, name: str) -> tuple[Path, Path]:
        """A certificate for this machine, and its key."""
        self._request(name, *NAMES, "-out", f"{name}.csr")
        signer = ["-CA", f"{self._name}.crt", "-CAkey", f"{self._name}.key", "-CAcreateserial"]
        files = ["-in", f"{name}.csr", "-out", f"{name}.crt"]
        self._openssl("x509", "-req", *files, *signer, "-copy_extensions", "copy", "-days", "2")
        return self._folder / f"{name}.crt", self._folder / f"{name}.key"

    def _request(self, name: str, *arguments: str) -> None:
        self._openssl("req", *KEY, "-keyout", f"{name}.key", "-subj", f"/CN={name}", *arguments)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


class TlsServer(RedisServer):
    """A server that speaks TLS alone, and asks its clients for certificates."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder)
        self.authority = authority
        self._certificate, self._key = authority.sign("server")
        self._client_certificate, self._client_key = authority.sign("client")
        files = {
            "--tls-ca-cert-file": authority.certificate,
            "--tls-cert-file": self._certificate,
            "--tls-key-file": self._key,
        }
        options = [str(part) for option in files.items() for part in option]
        self._options = ("--port", "0", "--tls-port", str(self.port), *options)

    @property
    def url(self) -> str:
        """With everything a client needs."""
        return self.url_with()

    def url_with(self, **changes: Path | None) -> str:
        """The same with other files; ``None`` leaves one out."""
        files: dict[str, Path | None] = {
            "ssl_ca_certs": self.authority.certificate,
            "ssl_certfile": self._client_certificate,
            "ssl_keyfile": self._client_key,
        }
        given = {name: str(file) for name, file in (files | changes).items() if file}
        return f"rediss://localhost:{self.port}/0?{urlencode(given)}"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)
