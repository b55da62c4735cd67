"""Who may ask what: hosts, keys and origins; limits of bodies and headers to every answer.

A browser on this machine can be told by any web page to send requests here. Three checks keep such
pages out: the Host header (DNS rebinding), Origin and Sec-Fetch-Site of requests that change
something, and content types that need the browser's permission first.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.errors import ApiError

COOKIE = "cogvideox_session"
_OPEN = ("/", "/healthz", "/login")  # need no key; "/" asks for it
_SAFE = ("GET", "HEAD", "OPTIONS")
_ANSWER_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer": browsers then send "Origin: null" with the form of the key.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, reachable from no other."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Keys:
    """The key that clients must send, or none."""

    def __init__(self, key: str | None):
        self._key = key.encode() if key else None

    @property
    def needed(self) -> bool:
        return self._key is not None

    def match(self, text: str) -> bool:
        """Whether a text is the key; takes the same time for every wrong one of its length."""
        return self._key is not None and hmac.compare_digest(text.encode(), self._key)

    def session(self) -> str:
        """The value of the cookie that stands for the key, which cannot be read from it."""
        assert self._key
        return hmac.new(self._key, b"cogvideox session", hashlib.sha256).hexdigest()

    def admit(self, headers: Headers) -> bool:
        """Whether a request carries the key, or the cookie that stands for it, or needs none."""
        if self._key is None:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.match(value.strip()):
            return True
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        return hmac.compare_digest(cookie.encode(), self.session().encode())


class Access:
    """Refuses requests that may not be made, before any route sees them."""

    def __init__(self, app: ASGIApp, keys: Keys, loopback: bool):
        """Args: loopback: the server listens on this machine only."""
        self._app, self._keys, self._loopback = app, keys, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _ANSWER_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        # With a key, a page of a rebound name has neither the key nor the cookie; and a proxy's
        # name is as good as this machine's.
        if self._loopback and not self._keys.needed and not is_loopback(_name(host)):
            raise ApiError(403, "wrong_host", "this server is reached by localhost only")
        if scope["method"] not in _SAFE:
            _check_origin(headers, host)
        if scope["path"] not in _OPEN and not self._keys.admit(headers):
            raise ApiError(
                401, "invalid_api_key", "send the key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def _check_origin(headers: Headers, host: str) -> None:
    """Refuses what a page of another site sends."""
    origin = headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise ApiError(403, "wrong_origin", "a page of another site sent this")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(403, "wrong_origin", "a page of another site sent this")


def _name(host: str) -> str:
    """The name or address of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def unsafe_to_listen(host: str, has_key: bool, anyone: bool) -> str | None:
    """Says why a server may not listen on a host; None if it may."""
    if is_loopback(host) or has_key or anyone:
        return None
    return (
        f"--host {host} is reached from other machines: give --api_key_file, or --allow_anyone to "
        "let everybody in"
    )
