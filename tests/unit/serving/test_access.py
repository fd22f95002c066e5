"""Who may ask: keys, origins and names of the machine."""

import pytest
from served import serving

from megatron_deepseek.cli.serve import main
from megatron_deepseek.serving.access import Access, check_origins, digest, is_loopback, read_keys
from megatron_deepseek.serving.errors import ApiError

KEYS = (digest(b"first"), digest("schlüssel".encode()))


def status_of(access: Access, path: str = "/v1/models", **headers: str) -> int:
    """200 or the status of the refusal; headers as starlette has them, which decodes them as latin-1."""
    try:
        access.check(path, headers)
        return 200
    except ApiError as error:
        return error.status


@pytest.mark.parametrize("authorization, status", [
    ("Bearer first", 200), ("bearer  first ", 200), ("Bearer " + "schlüssel".encode().decode("latin-1"), 200),
    ("Bearer second", 401), ("Bearer firs", 401), ("Bearer ", 401), ("", 401), ("first", 401), ("Basic first", 401)])
def test_one_of_the_keys_must_be_brought(authorization, status):
    assert status_of(Access(KEYS), authorization=authorization) == status


@pytest.mark.parametrize("path, status", [
    ("/", 200), ("/health", 200), ("/page/app.js", 200), ("/metrics", 401), ("/tokenize", 401), ("/version", 401),
    ("/v1/chat/completions", 401), ("/health/", 401), ("//", 401)])
def test_the_page_alone_is_open(path, status):
    assert status_of(Access(KEYS), path) == status


@pytest.mark.parametrize("origins, origin, status", [
    ((), "http://127.0.0.1:8000", 200), ((), "http://evil.example", 403), ((), "null", 403),
    ((), "http://127.0.0.1:9000", 403), ((), "http://127.0.0.1:8000.evil.example", 403),
    (("https://chat.example",), "https://chat.example", 200), (("https://chat.example",), "http://chat.example", 403),
    (("*",), "http://evil.example", 200)])
def test_pages_of_other_origins_may_not_ask(origins, origin, status):
    assert status_of(Access(origins=origins), host="127.0.0.1:8000", origin=origin) == status


@pytest.mark.parametrize("access, host, status", [
    (Access(), "evil.example:8000", 403), (Access(), "localhost:8000", 200), (Access(), "[::1]:8000", 200),
    (Access(), "chat.localhost", 200), (Access(), "localhost.evil.example", 403),
    (Access(origins=("https://chat.example",)), "chat.example", 200), (Access(local=False), "gpu7:8000", 200)])
def test_a_local_server_has_local_names(access, host, status):
    assert status_of(access, host=host) == status


def test_a_key_opens_a_local_server_by_any_name():
    assert status_of(Access(KEYS), host="chat.example", authorization="Bearer first") == 200


def test_keys_are_lines_of_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"# ours\n\n  first \r\n" + "schlüssel\n".encode())
    assert read_keys(file) == KEYS
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="has no key"):
        read_keys(file)


def test_origins_have_no_path():
    assert check_origins(["*", "http://a:1"]) == ("*", "http://a:1")
    for wrong in ("chat.example", "https://chat.example/", "ftp://a"):
        with pytest.raises(ValueError, match="is no origin"):
            check_origins([wrong])


def test_loopback():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("0.0.0.0")


def test_a_server_with_keys_and_an_origin(checkpoint, tmp_path):
    """The answer to a page of a named origin says that it may be read; without a key nobody is answered."""
    (tmp_path / "keys").write_text("secret\n")
    with serving(tmp_path, checkpoint, "--api-key-file", str(tmp_path / "keys"), "--allowed-origins",
                 "https://chat.example", "--served-model-name", "one", "two") as served:
        refused = served.ask("GET", "/v1/models")
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.error["type"] == "AuthenticationError"
        answer = served.ask("GET", "/v1/models", Authorization="Bearer secret", Origin="https://chat.example")
        assert [each["id"] for each in answer.json["data"]] == ["one", "two"]
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        asked = served.ask("OPTIONS", "/v1/models", Origin="https://chat.example",
                           Access_Control_Request_Method="POST", Access_Control_Request_Headers="authorization")
        assert asked.status == 200 and asked.headers["access-control-allow-origin"] == "https://chat.example"
        text = served.post("/v1/completions", {"model": "two", "prompt": "a"}, Authorization="Bearer secret")
        assert text.json["model"] == "one"
        assert served.ask("GET", "/health").status == 200


def test_mistakes_in_options_are_one_line(tmp_path, capsys):
    (tmp_path / "keys").write_text("")
    assert main(["--load", ".", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert capsys.readouterr().err == f"serve.py: error: --api-key-file {tmp_path / 'keys'} has no key\n"
