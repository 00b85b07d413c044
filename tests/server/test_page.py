"""The page: what is served, its modules (in node), and what it does in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as browsers
import pytest
from browser import ENTER, ESCAPE, RELEASED, SHIFT, UP, Browser
from live_server import Live, live
from starlette.testclient import TestClient

from orthrus_gguf.server.app import App, Settings
from orthrus_gguf.server.page_files import FILES

MODULES = sorted((Path(__file__).parent / "page").glob("*.test.mjs"))


def client(**settings: Any) -> TestClient:
    """Of a server that has no model yet."""
    return TestClient(App(Settings(**settings)).asgi, follow_redirects=False)


class TestServed:
    def test_everything_that_is_named_is_there_and_nothing_comes_from_elsewhere(self) -> None:
        """Also while the model is being loaded, and without a key."""
        found = client(keys=("secret",))
        wanted, seen = ["/"], set()
        while wanted:
            path = wanted.pop()
            if path in seen:
                continue
            seen.add(path)
            answer = found.get(path)
            assert answer.status_code == 200, path
            names = []
            if path == "/":
                names = [name for name in _Names(answer.text).urls if not name.startswith("#")]
            elif path.endswith(".mjs"):
                assert answer.headers["content-type"].startswith("text/javascript")
                names = re.findall(r'^(?:import|\} from).*"(.+)";$', answer.text, re.MULTILINE)
            elif path.endswith(".css"):
                assert "url(" not in answer.text
                assert "@import" not in answer.text
            base = path.rpartition("/")[0]
            wanted += [f"{base}/{name.removeprefix('./')}" for name in names]
        assert seen == set(FILES)
        assert found.get("/v1/slots").status_code == 401

    def test_nothing_in_it_needs_a_weaker_policy(self) -> None:
        answer = client().get("/")
        policy = dict(
            part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
        )
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        names = _Names(answer.text)
        assert not names.inline
        for content, _ in FILES.values():
            assert not re.search(
                rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", content
            )

    def test_files_that_a_browser_has_are_not_sent_again(self) -> None:
        found = client()
        first = found.get("/assets/app.mjs")
        again = found.get("/assets/app.mjs", headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = found.get("/assets/app.mjs", headers={"If-None-Match": '"other"'})
        assert other.content == first.content

    def test_prefix(self) -> None:
        """Addresses in the page are relative: without the slash they would lead elsewhere."""
        found = client(prefix="/llm")
        assert found.get("/llm/").status_code == found.get("/llm/assets/app.mjs").status_code == 200
        assert found.get("/llm").headers["location"] == "/llm/"
        assert found.get("/").status_code == 404

    @pytest.mark.parametrize(
        "path", ["/assets/../app.py", "/assets/%2e%2e/app.py", "/assets/", "/assets/index.html"]
    )
    def test_no_other_file_can_be_reached(self, path: str) -> None:
        assert client().get(path).status_code == 404

    def test_switched_off(self) -> None:
        assert client(page=False).get("/").status_code == 404


class _Names(HTMLParser):
    """Addresses of a page, and what stands in it that a strict policy forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                self.urls.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.inline.append(tag)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here to run the page's modules")
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_modules(module: Path) -> None:
    done = subprocess.run(["node", "--test", module], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^# pass [1-9]", done.stdout, re.MULTILINE)


def test_the_stream_tells_how_tokens_came_about(server: Live) -> None:
    """Whatever is coloured adds up to what the statistics say."""
    body = {
        "messages": [{"role": "user", "content": "import os"}],
        "stream": True,
        "return_origins": True,
        "max_tokens": 40,
        "seed": 1,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line.decode().removeprefix("data: ") for line in answer if line[:1] == b"d"]
    events = [json.loads(line) for line in lines if line.strip() != "[DONE]"]
    told = [e["choices"][0]["drafting"] for e in events if "drafting" in e["choices"][0]]
    timings = events[-1]["timings"]
    assert told[0] == {"origin": "plain", "tokens": 1, "cycles": 0}
    assert [one["tokens"] for one in told] == sorted(one["tokens"] for one in told)
    assert told[-1]["tokens"] <= timings["predicted_n"] == 40
    drafted = sum(one["origin"] == "drafted" for one in told)
    assert 0 < drafted <= timings["draft_n_accepted"]
    assert "drafting" not in json.dumps(_without_origins(server, body))


def _without_origins(server: Live, body: dict[str, Any]) -> Any:
    return server.post("/v1/chat/completions", {**body, "return_origins": False, "stream": False})


MISSING = browsers.missing()
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=f"the page is not tried: {MISSING}"),
]

#: The text of the newest answer.
ANSWER = ".assistant:last-child .body"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsers.browser(tmp_path_factory.mktemp("browser")) as found:
        found.size(1100, 800)
        yield found


class TestInBrowser:
    pytestmark = in_browser

    @pytest.fixture
    def page(self, window: Browser, server: Live) -> Iterator[Browser]:
        """The page with short, seeded answers, and no conversation open."""
        window.open(f"{server.url}/")
        window.wait("document.querySelector('#model').textContent === 'demo'")
        self.set(window, max_tokens="40", seed="3", temperature="0.7")
        yield window
        assert window.errors() == []

    @staticmethod
    def set(page: Browser, **values: str) -> None:
        """Change settings in the dialog."""
        page.click("#open-settings")
        for name, value in values.items():
            page.run(f"document.querySelector('[name={name}]').value = ''")
            page.type(f"[name={name}]", value)
        page.click("#settings .quiet")

    @staticmethod
    def ask(page: Browser, text: str, *, whole: bool = True) -> None:
        count = len(page.find(".assistant"))
        page.type("#prompt", text + ENTER)
        page.wait(f"document.querySelectorAll('.assistant').length > {count}")
        if whole:
            page.wait("!document.querySelector('.coming')")

    def test_send_and_stream(self, page: Browser, server: Live) -> None:
        """What is shown is what the server says without drafts."""
        self.ask(page, "def read(self):")
        body = {
            "messages": [{"role": "user", "content": "def read(self):"}],
            "max_tokens": 40,
            "seed": 3,
            "temperature": 0.7,
            "speculative": {"enabled": False},
        }
        status, found = server.post("/v1/chat/completions", body)
        assert status == 200
        said = found["choices"][0]["message"]["content"]
        assert _squeezed(page.text(ANSWER)) == _squeezed(said)
        assert page.find(f"{ANSWER} .drafted")
        assert re.match(
            r"\d\.\d\d tokens per cycle · .* tokens/s · 40 tokens", page.text(".figures")
        )
        assert page.text(".note") == "Cut off at the limit of tokens."
        assert page.text("#status") == "The answer has ended: 40 tokens."

    @pytest.mark.parametrize("how", ["button", "key"])
    def test_stop(self, page: Browser, how: str) -> None:
        self.set(page, max_tokens="900")
        self.ask(page, "import os", whole=False)
        page.wait(f"document.querySelector('{ANSWER}').textContent.length > 30")
        assert page.run("return document.querySelector('#send').hidden")
        page.click("#stop") if how == "button" else page.type("#prompt", ESCAPE)
        page.wait("!document.querySelector('.coming')")
        assert page.text(".assistant:last-child .note") == "Stopped."
        assert not page.run("return document.querySelector('#send').hidden")

    def test_answer_again_and_go_back(self, page: Browser) -> None:
        self.ask(page, "class A:")
        first = page.text(ANSWER)
        self.set(page, seed="4")
        page.click(".regenerate")
        page.wait("document.querySelector('.buttons span')?.textContent === '2/2'")
        assert page.text(ANSWER) != first
        page.click(".assistant [aria-label='Version before']")
        assert page.text(ANSWER) == first
        assert page.text(".assistant .buttons span") == "1/2"

    @pytest.mark.parametrize("how", ["button", "key"])
    def test_edit(self, page: Browser, how: str) -> None:
        self.ask(page, "import os")
        first = page.text(ANSWER)
        if how == "button":
            page.run("document.querySelector('.user .edit').click()")
        else:
            page.type("#prompt", UP)
        page.type(".editor", SHIFT + ENTER + RELEASED + "import sys" + ENTER)
        page.wait("document.querySelector('.user .buttons span')?.textContent === '2/2'")
        page.wait("!document.querySelector('.coming')")
        assert page.text(".user .body") == "import os\nimport sys"
        assert page.text(ANSWER) != first
        page.run("document.querySelector('.user [aria-label=\"Version before\"]').click()")
        assert (page.text(".user .body"), page.text(ANSWER)) == ("import os", first)

    def test_reload(self, page: Browser) -> None:
        """Texts and colours stay; an answer under way stays as far as it has come."""
        self.ask(page, "for line in file:")
        look = "document.querySelector('#messages').innerHTML"
        before = page.run(f"return {look}")
        page.reload()
        page.wait("document.querySelectorAll('.assistant').length === 1")
        assert page.run(f"return {look}") == before
        self.set(page, max_tokens="900")
        self.ask(page, "go on", whole=False)
        page.wait(f"document.querySelector('{ANSWER}').textContent.length > 50")
        page.reload()
        page.wait("document.querySelectorAll('.assistant').length === 2")
        assert len(page.text(ANSWER)) > 50
        assert page.text(".assistant:last-child .note") == "Stopped."

    def test_two_tabs(self, page: Browser, server: Live) -> None:
        """Each sees what the other writes, and neither loses anything."""
        self.ask(page, "import re")
        first, address = page.tab, page.run("return location.href")
        second = page.new_tab()
        page.switch(second)
        page.open(address)
        page.wait("document.querySelectorAll('.assistant').length === 1")
        self.ask(page, "in the second tab")
        page.switch(first)
        page.wait("document.querySelectorAll('.assistant').length === 2")
        self.ask(page, "in the first tab")
        page.switch(second)
        page.wait("document.querySelectorAll('.user').length === 3")
        page.wait("!document.querySelector('.coming')")
        page.run("document.querySelector('li:has([aria-current]) .quiet').click()")
        page.accept()
        page.wait("document.querySelectorAll('.user').length === 0")
        page.close_tab()
        page.switch(first)
        page.wait("document.querySelectorAll('.user').length === 0")

    def test_looks(self, page: Browser) -> None:
        """Dark and light by the system and by choice; drafts shown or not; a phone's screen."""
        ground = "return getComputedStyle(document.body).backgroundColor"
        page.dark(False)
        light = page.run(ground)
        page.dark(True)
        assert page.run(ground) != light
        self.set(page, theme="Light")
        assert page.run(ground) == light
        self.ask(page, "def f(x):")
        colour = f"return getComputedStyle(document.querySelector('{ANSWER} .drafted')).color"
        shown = page.run(colour)
        page.click("#drafts")
        assert page.run(colour) != shown
        assert page.run("return document.querySelector('#drafts').ariaPressed") == "false"
        page.click("#drafts")
        page.size(360, 640)
        assert page.run("return document.documentElement.scrollWidth") == 360
        seen = "return getComputedStyle(document.querySelector('#new')).visibility"
        page.wait(f"(() => {{ {seen} }})() === 'hidden'")
        page.click("#open-sidebar")
        page.wait("document.querySelector('#sidebar').getBoundingClientRect().left === 0")
        page.click("#new")
        page.size(1100, 800)

    def test_files(self, page: Browser) -> None:
        """A conversation leaves as a file, and comes back from it."""
        self.ask(page, "x = 1")
        answer = page.text(ANSWER)
        text = page.run_async(
            "const done = arguments[0], real = URL.createObjectURL;"
            "URL.createObjectURL = (blob) => { blob.text().then(done); return real(blob) };"
            "document.querySelector('#export').click()"
        )
        count = len(page.find("#conversations li"))
        page.run(
            "const field = document.querySelector('#import-file'), data = new DataTransfer();"
            "data.items.add(new File([arguments[0]], 'a.json')); field.files = data.files;"
            "field.dispatchEvent(new Event('change'))",
            text,
        )
        page.wait(f"document.querySelectorAll('#conversations li').length === {count + 1}")
        page.run("document.querySelector('#conversations li .row').click()")
        page.wait(f"document.querySelector('{ANSWER}').textContent === arguments[0]", answer)

    def test_key(self, window: Browser, chat_file: Path, tmp_path: Path) -> None:
        """It is asked for where it is missing, kept, and sent."""
        with live(chat_file, tmp_path, "-c", 256, "-n", 10, "--api-key", "secret") as server:
            window.open(f"{server.url}/")
            window.wait("document.querySelector('#model').textContent === 'chat'")
            self.ask(window, "a = 1")
            assert "API key" in window.text(".note.error")
            assert window.run("return document.activeElement.name") == "key"
            window.type("[name=key]", "secret" + ENTER)
            window.click(".regenerate")
            window.wait("document.querySelector('.buttons span')?.textContent === '2/2'")
            window.wait("!document.querySelector('.coming')")
            assert window.text(".note.error") == ""
            assert window.text(".figures").endswith("10 tokens")
            window.errors()  # the browser tells of the 401
        self.ask(window, "is anybody there?")
        window.wait("document.querySelector('.assistant:last-child .note.error:not([hidden])')")
        assert window.text(".note.error") == "The server cannot be reached."
        window.errors()


def _squeezed(text: str) -> str:
    """Without what Markdown may take for a mark."""
    return re.sub(r"[`*_\\>#\s-]", "", text)
