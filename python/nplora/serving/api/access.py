"""Access: checks who may use the server, by keys, hosts and origins."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from nplora.formats.errors import brief
from nplora.serving.request_error import RequestError

# ASGI's types.
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_NO_KEY = frozenset({"/health"})  # routes that need no key, in addition to the files of the page
_LOCAL_NAMES = frozenset({"localhost", "ip6-localhost", ""})


class Access:
    """Decides which requests are answered.

    - If there are keys, a request must contain one of the keys as `Authorization: Bearer KEY`.
    - If there are no keys, the Host header of a request must name this machine. This check
      prevents DNS rebinding, where another web site makes its host name point to this machine.
    - A request from a web page must come from this server's own page, or from one of `origins`. Without this
      check, any web page could make the browser send requests to this server.

    Args:
        keys: the accepted keys. If empty, no key is needed.
        origins: the origins of other web pages that may use the server.
        page: the paths of the files that make up the server's own web page. These files need no key.
        hosts: names of this machine in addition to those of the loopback interface.
    """

    def __init__(
        self,
        keys: Sequence[str] = (),
        origins: Collection[str] = (),
        page: Collection[str] = (),
        hosts: Collection[str] = (),
    ) -> None:
        self._keys = [key.encode() for key in keys]
        self._origins = frozenset(origins)
        self._open = _NO_KEY | frozenset(page)
        self._hosts = frozenset(hosts)

    def require(self, method: str, path: str, headers: dict[bytes, bytes], client: str) -> str:
        """Check a request, and return the name by which the fair queue distinguishes clients.

        Raises:
            RequestError: the request is refused.
        """
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        if origin is not None:
            self._require_origin(origin.decode("latin-1"), host)
        if method == "OPTIONS" or path in self._open:
            return client
        if not self._keys:
            self._require_local(host)
            return client
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        found = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(found):
            what = "wrong" if key else "missing"
            raise RequestError(
                f"the API key is {what}: send it as 'Authorization: Bearer KEY'", 401, code="invalid_api_key"
            )
        return f"key {found.index(True)} {client}"

    def _require_origin(self, origin: str, host: str) -> None:
        if origin in self._origins or "*" in self._origins:
            return
        try:
            is_own = bool(host) and urlsplit(origin).netloc == host
        except ValueError:  # "http://[" for example
            is_own = False
        if not is_own:
            raise RequestError(
                f"requests from web pages of {brief(origin)} are refused; --allow-origin would allow them",
                403,
                code="origin_refused",
            )

    def _require_local(self, host: str) -> None:
        name = _host_name(host)
        if name not in _LOCAL_NAMES | self._hosts and not is_loopback(name):
            raise RequestError(
                f"the host name {brief(host)} does not belong to this machine; without an API key, "
                "send requests to localhost",
                403,
                code="host_refused",
            )


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    """Whether a host is the loopback interface of this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
