"""Certificates of the local load balancers: the operator's, or one that we sign ourselves."""

from __future__ import annotations

import ipaddress
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clouds.contract.errors import BadConfig
from runtime.home import write_private

LASTS_DAYS = 3650


class Certificate:
    """The one that all endpoints of a home show.

    Args:
        cert_file, key_file: the operator's; None: one of our own, in ``root``.
        name: that clients call it by.
    """

    def __init__(self, cert_file: Path | None, key_file: Path | None, root: Path, name: str) -> None:
        self.given = cert_file is not None or key_file is not None
        self._one_of_two = self.given and None in (cert_file, key_file)
        self.files = cert_file or root / "tls.crt", key_file or root / "tls.key"
        self._name = name

    def ready(self) -> None:
        """Makes our own if there is none yet, or it is broken; not safe to call twice at the same time. Raises
        BadConfig if the operator's cannot be used."""
        if self._one_of_two:
            raise BadConfig(
                "Only one of the load balancer's certificate and key is set.",
                remedy="Set both HELIOSTAT_BALANCER_CERT_FILE and HELIOSTAT_BALANCER_KEY_FILE, or none.",
            )
        if self.given:
            checked(*self.files)
        else:
            self_signed(*self.files, [self._name])


def checked(cert_file: Path, key_file: Path) -> None:
    """Raises BadConfig unless both files can be read and belong together."""
    try:
        (certificate, *_) = x509.load_pem_x509_certificates(cert_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        belongs = _public(certificate.public_key()) == _public(key.public_key())
    except (OSError, ValueError, TypeError) as e:  # a bad PEM; an encrypted key
        # No text of the exception: it may quote the file.
        why = f" ({e.strerror})" if isinstance(e, OSError) else ""
        raise BadConfig(
            f"The load balancer's certificate {cert_file} or its key {key_file} cannot be read{why}.",
            remedy="Set HELIOSTAT_BALANCER_CERT_FILE and HELIOSTAT_BALANCER_KEY_FILE to PEM files, the key not "
            "encrypted, both readable by this user.",
        ) from None
    if not belongs:
        raise BadConfig(
            f"The key {key_file} is not that of the certificate {cert_file}.",
            remedy="Set HELIOSTAT_BALANCER_CERT_FILE and HELIOSTAT_BALANCER_KEY_FILE to files that belong together.",
        )


def self_signed(cert_file: Path, key_file: Path, names: list[str]) -> None:
    """Makes both files, 0600, unless they are there and well: for clients that do TLS without checking whom they
    speak to. Not safe to call twice at the same time."""
    try:
        checked(cert_file, key_file)
        return
    except BadConfig:
        pass  # not there yet, or half
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "heliostat")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=LASTS_DAYS))
        .add_extension(x509.SubjectAlternativeName([_name(n) for n in _all(names)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    write_private(key_file, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain).decode())
    write_private(cert_file, certificate.public_bytes(pem).decode())


def _all(names: list[str]) -> list[str]:
    return list(dict.fromkeys([*names, "localhost", "127.0.0.1", socket.gethostname()]))


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _public(key: object) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.DER, form)  # type: ignore[attr-defined, no-any-return]
