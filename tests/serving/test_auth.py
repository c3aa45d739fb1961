"""Keys: every route but the probes asks for one, found by going through the routes themselves."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from hasten.serving.config import ConfigError, ServeConfig
from hasten.serving.gate import OPEN
from tests.serving.conftest import Live

KEY, OTHER = "sk-marked-secret-1", "sk-marked-secret-2"


def routes(live: Live) -> list[tuple[str, str]]:
    """(method, path) of every route, mounted ones included."""
    found = []
    for route in live.app.routes:
        path = re.sub(r"{.*?}", "x", route.path)  # type: ignore[attr-defined]
        methods = getattr(route, "methods", None) or {"GET"}
        found += [(method, path) for method in methods]
        if not hasattr(route, "methods"):  # a mounted folder
            found += [("GET", f"{path}/"), ("GET", f"{path}/index.html"), ("GET", f"{path}/x.js")]
    return found


def test_every_route_but_the_probes_asks_for_a_key(serve: Callable[..., Live]) -> None:
    live = serve(api_key=(KEY, OTHER))
    swept = routes(live)
    assert {path for _, path in swept} >= {
        "/v1/chat/completions",
        "/docs",
        "/openapi.json",
        "/metrics",
        "/hasten/config",
        "/ui",
        *OPEN,
    }
    wrong = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": "Bearer"},
        {"authorization": f"Token {KEY}"},
        {"authorization": "Basic !!!"},
        {"x-api-key": KEY},
    ]
    for method, path in [*swept, ("GET", "/nothing/here"), ("POST", "/v1/completions/")]:
        for headers in wrong:
            answer = live.http.request(method, path, headers=headers)
            if path in OPEN:
                assert answer.status_code == 200, path
            else:
                assert answer.status_code == 401, (method, path, headers)
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        assert live.http.request(method, f"{path}?key={KEY}").status_code in (200, 401)
    basic = base64.b64encode(f"me:{OTHER}".encode()).decode()
    for good in (f"Bearer {KEY}", f"bearer {OTHER}", f"Basic {basic}"):
        answer = live.http.get("/v1/models", headers={"authorization": good})
        assert answer.status_code == 200


def test_config_masks_keys(serve: Callable[..., Live]) -> None:
    live = serve(api_key=(KEY, OTHER))
    answer = live.http.get("/hasten/config", headers={"authorization": f"Bearer {KEY}"})
    assert answer.json()["settings"]["api_key"] == ["***", "***"]
    assert "marked" not in answer.text


def test_prefixes_are_shared_within_a_key_and_salt_only(serve: Callable[..., Live]) -> None:
    live = serve(api_key=(KEY, OTHER))

    def cached(key: str, salt: str | None = None) -> int:
        body = {"prompt": "one two three " * 20, "max_tokens": 1, "cache_salt": salt}
        answer = live.http.post(
            "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
        )
        details = answer.json()["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER) == 0
    assert cached(KEY, "salt") == 0
    assert cached(KEY, "salt") > 0


def test_cors_is_off_unless_an_origin_is_named(live: Live, serve: Callable[..., Live]) -> None:
    asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in live.http.get("/health", headers=asked).headers
    open_ = serve(cors_origin=("http://page.example",), api_key=(KEY,))
    preflight = httpx.options(f"{open_.url}/v1/completions", headers=asked)
    assert preflight.headers["access-control-allow-origin"] == "http://page.example"
    other = {**asked, "origin": "http://other.example"}
    assert "access-control-allow-origin" not in open_.http.get("/health", headers=other).headers


def test_web_pages_cannot_post_without_asking(live: Live) -> None:
    body = json.dumps({"prompt": "x"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = live.http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 415


def test_names_of_the_internet_are_refused_without_a_key(serve: Callable[..., Live]) -> None:
    """A page whose name was made to point to this machine is of the server's own origin."""

    def status(live: Live, host: str, path: str = "/v1/models", key: str = "") -> int:
        headers = {"host": host, **({"authorization": f"Bearer {key}"} if key else {})}
        return live.http.get(path, headers=headers).status_code

    live = serve(allowed_host=("hasten.example",))
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "app.localhost"):
        assert status(live, host) == 200
    assert status(live, "HASTEN.example:80") == 200  # it was named
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.x"):
        assert status(live, host) == 403
        assert status(live, host, "/ui/") == 403
        assert status(live, host, "/health") == 200
    keyed = serve(api_key=(KEY,))
    assert status(keyed, "evil.example", key=KEY) == 200
    assert status(keyed, "evil.example") == 401


def test_load_balancers_may_ask_with_head(live: Live) -> None:
    for path in OPEN:
        answer = live.http.head(path)
        assert answer.status_code == 200 and answer.content == b""


def test_no_open_address_without_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ConfigError, match="--allow-no-key"):
            ServeConfig(host=host).keys()
        assert ServeConfig(host=host, allow_no_key=True).keys() == []
        assert ServeConfig(host=host, api_key=("k",)).keys() == ["k"]
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\ntwo\n")
    assert ServeConfig(host="0.0.0.0", api_key_file=str(file)).keys() == ["one", "two"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        ServeConfig(api_key_file=str(file)).keys()
    with pytest.raises(ConfigError, match="cannot read"):
        ServeConfig(api_key_file=str(tmp_path / "none")).keys()
    with pytest.raises(ConfigError, match="printable"):
        ServeConfig(api_key=("a b",)).keys()
