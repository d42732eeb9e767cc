"""`yi-vl serve` after its options: whatever can be wrong with them is found before the model is loaded."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from .middleware import check_origin, hosts_for
from .protocol import Limits

if TYPE_CHECKING:
    from ..predict import YiVL

KEY_VARIABLE = "YI_VL_API_KEY"


def run(
    load: Callable[[], YiVL],
    name: str,
    *,
    host: str,
    port: int,
    api_keys: Sequence[str],
    api_key_file: str | None,
    cors_origins: Sequence[str],
    allowed_hosts: Sequence[str],
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    shutdown_seconds: int,
    allow_remote_images: bool,
    limits: Limits,
) -> None:
    """Load a model and serve it until Ctrl-C or SIGTERM; a `ValueError` says what is wrong with an option."""
    options: dict[str, Any] = {
        "api_keys": read_keys(api_keys, api_key_file),
        "allowed_hosts": hosts_for(host, allowed_hosts),
        "cors_origins": [check_origin(origin) for origin in cors_origins],
        "allow_remote_images": allow_remote_images,
        "limits": limits,
    }
    check_certificate(ssl_certfile, ssl_keyfile)
    sockets = bind(host, port)
    yi_vl = load()
    from .app import create_app  # here, for it imports torch

    config = uvicorn.Config(
        create_app(yi_vl, name, **options),
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        timeout_graceful_shutdown=shutdown_seconds,
    )
    for bound in sockets:
        address, bound_port, *_ = bound.getsockname()
        url = f"{'https' if ssl_certfile else 'http'}://{f'[{address}]' if ':' in address else address}:{bound_port}"
        print(f"Serving {name} at {url}; Ctrl-C stops.", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal that it has already obeyed
        uvicorn.Server(config).run(sockets)


def bind(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each of a host's addresses; they listen, and connections are refused until then, once served.

    Raises:
        ValueError: there is no such host or port, or it is in use or not allowed.
    """
    if not host.strip():
        raise ValueError("the host is empty; give --host 0.0.0.0 to listen at all of this machine's addresses.")
    if not 0 <= port <= 65535:
        raise ValueError(f"there is no port {port}; give one from 1 to 65535, or 0 for any that is free.")
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"there is no address {host!r} to listen at ({error}); try --host 127.0.0.1.") from error
    sockets: list[socket.socket] = []
    errors: list[OSError] = []
    for family, *_, (address, _, *scope) in dict.fromkeys(addresses):
        try:
            sockets.append(_bind(family, (address, port or (sockets[0].getsockname()[1] if sockets else 0), *scope)))
        except OSError as error:
            errors.append(error)
    severe = [error for error in errors if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)]
    if severe or not sockets:  # a host without IPv6 may still call itself ::1
        for bound in sockets:
            bound.close()
        reason = os.strerror((severe or errors)[0].errno or 0)
        raise ValueError(f"cannot listen at {host}, port {port}: {reason}; try another --host or --port.")
    return sockets


def _bind(family: int, place: Any) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port is free once its last server has ended
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(place)
    except OSError:
        bound.close()
        raise
    return bound


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Raise a `ValueError` unless the files are a certificate chain and its unencrypted private key (or neither)."""
    if certificate is None:
        if key is not None:
            raise ValueError("--ssl-keyfile is the key of a certificate; give --ssl-certfile as well.")
        return
    for path in (certificate, key):
        if path is not None and not os.path.isfile(path):
            raise ValueError(f"{path} is not a file; --ssl-certfile and --ssl-keyfile take PEM files.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{certificate} with {key or 'itself'} is no PEM certificate with its unencrypted private key: {error}."
        ) from error


def read_keys(keys: Sequence[str], file: str | None) -> list[str]:
    """All API keys: those of the options or the environment, and those of a file.

    Args:
        file: one key a line; empty lines and lines that begin with `#` are skipped.

    Raises:
        ValueError: a key is empty, or the file cannot be read or holds none. A server never opens by mistake.
    """
    if not all(key.strip() for key in keys):
        raise ValueError("the API key is empty; give one, or leave --api-key out.")
    if not keys and not os.environ.get(KEY_VARIABLE, "-").strip():
        raise ValueError(f"{KEY_VARIABLE} is set but empty; put a key into it, or unset it.")
    if file is None:
        return list(keys)
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the key file {file} cannot be read: {error}.") from error
    file_keys = [line for line in lines if line and not line.startswith("#")]
    if not file_keys:
        raise ValueError(f"the key file {file} holds no key; write one a line.")
    return [*keys, *file_keys]
