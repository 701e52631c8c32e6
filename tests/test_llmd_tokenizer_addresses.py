"""Where llm-d's tokenization service is said to be, and what is there in its place."""

import re
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from kvindex.config import TokenizersConfig
from kvindex.errors import UserError
from kvindex.llmd_tokenizer import LlmdTokenizer
from kvindex.tokenizing import open_prompts
from scorer import Prompts, Unavailable


def test_somebody_else_is_there(tmp_path):
    """Bytes that are no HTTP/2 at all."""
    import socket

    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def answer():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nwhat?")

        thread = threading.Thread(target=answer)
        thread.start()
        far = LlmdTokenizer(f"unix://{path}", timeout_s=5)
        with pytest.raises(Unavailable, match=re.escape(path)):
            far.text("a", model="m", add_special_tokens=True)
        far.close()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "url",
    [
        "grpc://",
        "grpc://host",
        "grpc://host:port",
        "grpc://host:99999",
        "grpc://host:1/path",
        "grpc://u:p@host:1",
        "grpc://host:1?a=b",
        "unix://relative",
        "unix:relative",
        "unix://",
        "grpc+unix://host/path",
        "unix:///" + "x" * 200,
    ],
)
def test_an_address_that_is_none_is_refused_at_start(url):
    with ExitStack() as running, pytest.raises(UserError, match=r"tokenizers\.remote_url"):
        open_prompts(TokenizersConfig(remote_url=url), running)


def test_a_key_is_not_sent_where_none_is_taken():
    config = TokenizersConfig(remote_url="grpc://localhost:1", remote_api_key="secret")
    with ExitStack() as running, pytest.raises(UserError, match=r"tokenizers\.remote_api_key") as error:
        open_prompts(config, running)
    assert "secret" not in str(error.value)


def test_nobody_there(tmp_path):
    far = LlmdTokenizer(f"unix://{tmp_path}/none")
    with Prompts(remote=far) as prompts, pytest.raises(Unavailable, match=r"/none .*see whether it runs"):
        prompts.read({"model": "m", "prompt": "a"})
    far.close()


def test_without_the_packages_the_remedy_is_said():
    program = """if True:
        import sys
        from contextlib import ExitStack
        sys.modules["grpc"] = None
        from kvindex.config import TokenizersConfig
        from kvindex.errors import UserError
        from kvindex.tokenizing import open_prompts
        with ExitStack() as running:
            open_prompts(TokenizersConfig(), running)
            try:
                open_prompts(TokenizersConfig(remote_url="unix:///tmp/s"), running)
            except UserError as error:
                print(error)
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=True)
    assert "unix:///tmp/s" in said.stdout
    assert "kv-cache-indexer[grpc]" in said.stdout
