"""The server's page, in a real browser against the real routes."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import pytest

from llmr_ray.serving.keys import add_key
from tests.browser import needs_browser, rendered
from tests.live_server import Server
from tests.serving_world import World, documents, world

pytestmark = [pytest.mark.slow, needs_browser]

HOSTILE = "a b <img src=x onerror=\"document.title='taken'\"> <script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> World:
    """60 documents, one of which would run a script if a page let it."""
    rows = documents(60)
    rows[0]["text"] = HOSTILE
    return world(tmp_path_factory.mktemp("page"), rows)


@pytest.fixture(scope="module")
def server(docs: World) -> Iterator[Server]:
    running = Server(docs.service())
    yield running
    running.close()


class Page(HTMLParser):
    """What stands in the elements of each class or id, and which tags there are within the results."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.of: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self._open: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = [*(given.get("class") or "").split(), given.get("id") or ""]
        self.tags.append(tag)
        if tag not in {"meta", "input", "img", "br", "link"}:
            self._open.append(names)
        for name in names:
            self.of.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for names in self._open:
            for name in names:
                self.of[name][-1] += data


def shown(server: Server, tmp_path: Path, **asked: str) -> Page:
    return Page(rendered(f"{server.url}/#{urlencode(asked)}", tmp_path / "profile"))


@pytest.mark.parametrize("task", ["qa", "chat"])
def test_a_query_shows_the_routes_results(server: Server, docs: World, tmp_path: Path, task: str) -> None:
    """A page that reads another field than the route gives shows nothing, and no test of the route tells."""
    page = shown(server, tmp_path, task=task, q="a b f c")
    [hits] = server.post("/v1/retrieve", {"query": "a b f c", "task": task, "top_k": 10}).json()["results"]
    assert page.of["id"] == [hit["id"] for hit in hits]
    assert page.of["text"] == [hit["text"] for hit in hits]
    assert page.of["score"] == [f"{hit['score']:.3f}" for hit in hits]
    assert page.of["title"] == [hit["title"] for hit in hits if hit.get("title")]
    [times] = page.of["times"]
    assert "10 results" in times
    assert f"snapshot {docs.current}" in times
    assert all(name in times for name in ("encode", "search", "round trip"))
    assert f"60 documents, snapshot {docs.current}" in page.of["what"][0]
    assert page.of["error"] == [""]


def test_a_document_is_text_and_not_markup(server: Server, tmp_path: Path) -> None:
    """Whoever can add a document could otherwise run a script with the key of whoever searches."""
    page = shown(server, tmp_path, task="qa", q=HOSTILE)
    assert HOSTILE in page.of["text"]
    assert "img" not in page.tags
    assert page.tags.count("script") == 1


def test_a_server_with_keys_asks_for_one(docs: World, tmp_path: Path) -> None:
    """Without it the page would only say that it may not."""
    keys = tmp_path / "keys.json"
    add_key(keys, "reader", ("read",))
    running = Server(docs.service(docs.settings(keys_file=str(keys))))
    try:
        html = rendered(running.url, tmp_path / "profile")
        assert 'id="keybox"' in html
        assert 'id="keybox" hidden' not in html
        assert "key" in Page(html).of["what"][0]
    finally:
        running.close()
