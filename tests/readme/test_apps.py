"""The two apps of README.md, as they stand there, with an artifact of the bundled checkpoint in the place of a large one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

import oxfuse

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("apps") / "artifact"
    return oxfuse.compile(ROOT / "artifacts" / "tiny-gpt-oss", place, target="onnx-portable")


def app(word: str, artifact: Path) -> str:
    """Return the one block of the page that holds `word`, for the artifact."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if word in block)
    assert "gpt-oss-20b-cpu" in found
    return str(found).replace("gpt-oss-20b-cpu", str(artifact))


@pytest.fixture
def service(artifact: Path) -> Iterator[dict[str, Any]]:
    names: dict[str, Any] = {}
    exec(compile(app("FastAPI", artifact), "README.md", "exec"), names)
    yield names
    names["model"].close()


def test_the_service_streams_what_generate_gives(service: dict[str, Any], artifact: Path) -> None:
    with TestClient(service["app"]) as client:
        answer = client.get("/generate", params={"prompt": "def main():", "tokens": 30})
        (expected,) = oxfuse.load(artifact).generate("def main():", max_new_tokens=30)
        assert (answer.status_code, answer.text) == (200, expected.text) and len(answer.text) > 20
        refused = client.get("/generate", params={"prompt": "x", "tokens": -1})
        assert refused.status_code == 400 and "max_new_tokens" in refused.json()["detail"]


def test_a_client_that_leaves_ends_its_request(service: dict[str, Any]) -> None:
    """The server hears of it while it sends; httpx's own transport would not tell."""
    engine, sent = service["model"].scheduler.engine, list[dict[str, Any]]()
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not receive.asked:  # type: ignore[attr-defined]
            receive.asked = True  # type: ignore[attr-defined]
            return {"type": "http.request", "body": b"", "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    receive.asked = False  # type: ignore[attr-defined]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and message["body"]:
            left.set()

    url = httpx.URL("http://test/generate", params={"prompt": "def main():", "tokens": "120"})
    scope = dict(type="http", method="GET", path="/generate", query_string=url.query, headers=[], http_version="1.1")

    async def visit() -> None:
        await service["app"]({**scope, "asgi": {"version": "3.0"}}, receive, send)
        for _ in range(100):  # what is cleaned up beside the event loop
            if not engine.used_blocks:
                return
            await asyncio.sleep(0.05)

    asyncio.run(visit())
    chunks = [message for message in sent if message.get("body")]
    assert 1 <= len(chunks) < 60 and engine.used_blocks == 0


def test_the_worker_answers_and_ends(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(app("queue", artifact), "README.md", "exec"), names)
    assert not names["worker"].is_alive()
    (expected,) = oxfuse.load(artifact).generate("Once upon", max_new_tokens=50)
    assert capsys.readouterr().out == expected.text + "\n"
