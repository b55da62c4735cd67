"""Keys, hosts, origins and limits: who is let in, and what is refused before any work."""

import socket

import pytest

import serve
from runtime.exit_codes import run_main
from tests.tiny_models import save_tiny_model
from tests.web.serving import Server
from web.access import is_loopback

KEY = "0123456789abcdef-key"
PROMPT = {"prompt": "a red circle"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_tiny_model(folder, sample_height=4, sample_width=6, sample_frames=5)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "videos"
    with Server(model, folder, "--no_worker", "--max_queue=3") as server:
        yield server


@pytest.fixture(scope="module")
def locked(model, tmp_path_factory):
    """A server that asks for a key."""
    folder = tmp_path_factory.mktemp("locked") / "videos"
    file = folder.parent / "key.txt"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    more = ("--no_worker", f"--api_key_file={file}")
    with Server(model, folder, *more) as server:
        yield server


def test_the_key_is_asked_for(locked):
    right = {"authorization": f"Bearer {KEY}"}
    assert locked.ask("GET", "/v1/videos", **right).status == 200
    for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY):
        answer = locked.ask("GET", "/v1/videos", authorization=wrong)
        assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
    for method, path in (("POST", "/v1/videos"), ("GET", "/metrics"), ("GET", "/v1/models")):
        assert locked.ask(method, path).status == 401
    assert locked.ask("GET", "/healthz").json["status"] == "ok"
    # As a proxy in front of it sends it.
    assert locked.ask("GET", "/v1/videos", host="videos.example", **right).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "", "10.0.0.1", "["])
def test_another_host_name_is_refused(server, host):
    """A page whose name was rebound to 127.0.0.1 sends its own name."""
    assert server.ask("GET", "/v1/videos", host=host).status in (400, 403)
    for own in (f"localhost:{server.port}", f"127.0.0.1:{server.port}", "[::1]:1"):
        assert server.ask("GET", "/v1/videos", host=own).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing(server, headers):
    assert server.ask("POST", "/v1/videos", PROMPT, **headers).status == 403
    assert server.ask("DELETE", "/v1/videos/video_0123456789abcdef", **headers).status == 403
    own = {"origin": server.url, "sec_fetch_site": "same-origin"}
    assert server.ask("DELETE", "/v1/videos/video_0123456789abcdef", **own).status == 404


def test_what_a_plain_form_of_another_site_can_send_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        body = b'{"prompt": "a red circle"}'
        assert server.ask("POST", "/v1/videos", body, content_type=kind).status == 415


def test_a_full_queue_is_said(server):
    ids = [server.create(seed=seed)["id"] for seed in range(3)]
    answer = server.ask("POST", "/v1/videos", PROMPT)
    assert answer.status == 429 and int(answer.headers["retry-after"]) > 0
    assert server.create(seed=0)["id"] == ids[0]  # it waits already
    for id_ in ids:
        assert server.ask("DELETE", f"/v1/videos/{id_}").status == 200


def test_large_bodies_are_not_read(server):
    for size in ({"content_length": str(1 << 40)}, {"transfer_encoding": "chunked"}):
        with socket.create_connection((server.host, server.port), timeout=20) as connection:
            lines = ["POST /v1/videos HTTP/1.1", "Host: localhost"]
            headers = {"content_type": "application/json", **size}
            lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            try:
                for _ in range(200):
                    connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            except OSError:  # it was closed
                pass
            answer = connection.recv(100) if "content_length" in size else b""
        assert not answer or b" 413 " in answer
    assert server.ask("GET", "/healthz").status == 200


def test_slow_clients_keep_nobody_waiting(server):
    slow = [socket.create_connection((server.host, server.port)) for _ in range(50)]
    for number, connection in enumerate(slow):
        start = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(start if number % 2 else start + b"Content-Length: 9\r\n\r\n{")
    assert server.ask("GET", "/v1/videos").status == 200
    for connection in slow:
        connection.close()


def test_metrics_count(server):
    server.ask("GET", "/v1/videos/nothing")
    text = server.ask("GET", "/metrics").body.decode()
    assert 'route="/v1/videos/{id}",status="404"' in text
    assert 'cogvideox_videos{status="queued"} 0' in text and "cogvideox_worker_up 0" in text


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "localhost.com", "10.0.0.1", "")))


def refusal(capsys, *more: str) -> str:
    with pytest.raises(SystemExit) as end:
        words = ["--output_dir=never", "--port=0", "--no_worker", *more]
        run_main(lambda: serve.run(serve.parse_arguments(words), words))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_bad_options_end_in_one_line(model, server, tmp_path, capsys):
    here = f"--model_id={model}"
    assert "give --api_key_file" in refusal(capsys, here, "--host=0.0.0.0")
    assert "no-such-host" in refusal(capsys, here, "--host=no-such-host.invalid", "--allow_anyone")
    assert "in use" in refusal(capsys, here, f"--port={server.port}")
    key = tmp_path / "key"
    key.write_text("short\n")
    assert "can be read by others" in refusal(capsys, here, f"--api_key_file={key}")
    key.chmod(0o600)
    assert "is not a key of 16" in refusal(capsys, here, f"--api_key_file={key}")
    assert "there is no such folder" in refusal(capsys, "--model_id=./no/model")
