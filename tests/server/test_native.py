"""llama-server's own endpoints, and the doors that every request goes through."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live
from prometheus_client.parser import text_string_to_metric_families

TEXT = "def read(self):\n    return 'naïve 🙂'\n"


def test_health_and_props(server: Live) -> None:
    assert json.loads(server.get("/health")[1]) == {"status": "ok"}
    props = json.loads(server.get("/props")[1])
    assert props["total_slots"] == 3
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert props["default_generation_settings"]["params"]["speculative"] == "fused@6x3"
    assert "<|im_start|>" in props["chat_template"]
    assert props["thinking_switch"] is True


def test_tokenize_and_back(server: Live) -> None:
    _, found = server.post("/tokenize", {"content": TEXT})
    assert server.post("/detokenize", found) == (200, {"content": TEXT})
    _, pieces = server.post("/tokenize", {"content": "a<|im_end|>é", "with_pieces": True})
    assert "<|im_end|>" in [token["piece"] for token in pieces["tokens"]]
    status, wrong = server.post("/detokenize", {"tokens": [1, 10**9]})
    assert (status, wrong["error"]["param"]) == (400, "tokens[1]")


def test_completion(server: Live) -> None:
    body = {"prompt": "import ", "n_predict": 9, "seed": 3, "n_probs": 2}
    status, whole = server.post("/completion", body)
    assert status == 200
    assert whole["tokens_predicted"] == len(whole["tokens"]) == 9
    assert len(whole["completion_probabilities"]) == 9
    assert whole["stop_type"] == "limit"
    data = json.dumps({**body, "stream": True}).encode()
    _, text = server._call(urllib.request.Request(f"{server.url}/completion", data, method="POST"))
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [token for event in events for token in event["tokens"]] == whole["tokens"]
    assert {event["origin"] for event in events[:-1]} <= {"plain", "drafted", "corrected"}
    assert events[-1]["stop"] is True


def test_metrics(server: Live) -> None:
    server.post("/completion", {"prompt": "import ", "n_predict": 30, "temperature": 0})
    names: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics")[1]):
        for sample in family.samples:
            names[sample.name] = names.get(sample.name, 0) + sample.value
    assert names["llamacpp:tokens_predicted_total"] >= 30
    assert names["llamacpp:n_decode_total"] > 0
    accepted = names["llamacpp:spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted <= names["llamacpp:spec_decode_num_draft_tokens_total"]
    assert names["llamacpp:spec_decode_num_accepted_tokens_per_pos_total"] == accepted
    assert names["llamacpp:requests_processing"] == 0


class TestSlots:
    body: Any = {"prompt": "import os\n" * 20, "n_predict": 4, "id_slot": 0, "temperature": 0}  # noqa: RUF012

    def test_saved_erased_and_restored(self, server: Live) -> None:
        _, first = server.post("/completion", self.body)
        saved = server.post("/slots/0?action=save", {"filename": "a.slot"})
        count = first["tokens_evaluated"] + 3
        assert saved == (200, {"id_slot": 0, "filename": "a.slot", "n_saved": count})
        assert server.post("/slots/0?action=erase", {})[1]["n_erased"] == count
        restored = server.post("/slots/0?action=restore", {"filename": "a.slot"})
        assert restored[1]["n_restored"] == count
        _, again = server.post("/completion", self.body)
        assert again["content"] == first["content"]
        assert again["tokens_cached"] == first["tokens_evaluated"] - 1

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../a", "/etc/passwd", "a/b", ".hidden", "a\x00", "a\n", "é", 7]
    )
    def test_names_that_lead_elsewhere(self, server: Live, name: Any) -> None:
        for action in ("save", "restore"):
            status, found = server.post(f"/slots/0?action={action}", {"filename": name})
            assert (status, found["error"]["param"]) == (400, "filename")

    def test_files_that_are_none(self, server: Live, tmp_path_factory: Any) -> None:
        folders = tmp_path_factory.getbasetemp().glob("server*/slots")
        (folder,) = {path.resolve() for path in folders}
        (folder / "bad").write_bytes(b"PK\x03\x04 nonsense")
        (folder / "link").symlink_to(folder / "bad")
        for name, status in (("bad", 400), ("link", 400), ("gone", 404)):
            assert server.post("/slots/0?action=restore", {"filename": name})[0] == status
        assert server.post("/slots/99?action=erase", {})[0] == 404
        assert server.post("/slots/0?action=burn", {})[0] == 400


def test_the_description_is_complete(server: Live) -> None:
    found = json.loads(server.get("/openapi.json")[1])
    chat = found["paths"]["/v1/chat/completions"]["post"]
    name = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    described = found["components"]["schemas"][name]
    assert described["required"] == ["messages"]
    assert described["properties"]["n"] == {"type": "integer", "minimum": 1, "maximum": 16}
    text = json.dumps(found)
    for reference in {
        part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]
    }:
        assert found["components"]["schemas"][reference]["properties"]
    assert found["paths"]["/health"]["get"]["security"] == []


def test_keys_prefix_cors_and_closed_doors(chat_file: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("second\nthird\n")
    flags = ("-c", 256, "--api-key", "first", "--api-key-file", keys, "--api-prefix", "/llm")
    with live(
        chat_file, tmp_path, *flags, "--cors", "https://a.example", "--no-props", ready=False
    ) as server:
        for _ in range(400):
            try:
                if server.get("/llm/health")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.05)
        assert server.get("/health")[0] == 404
        assert server.get("/llm/v1/models")[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer nope"},
            {"Authorization": "Bearer "},
            {"X-Api-Key": "firs"},
            {"Authorization": "Basic first"},
        ):
            status, found = server.post("/llm/tokenize", {"content": "a"}, **headers)
            assert (status, found["error"]["type"]) == (401, "authentication_error")
        for headers in (
            {"Authorization": "Bearer first"},
            {"Authorization": "bearer third"},
            {"X-Api-Key": "second"},
        ):
            assert server.post("/llm/tokenize", {"content": "a"}, **headers)[0] == 200
        key = {"X-Api-Key": "first"}
        assert server.get("/llm/props", **key)[0] == 501
        assert server.get("/llm/metrics", **key)[0] == 501
        assert server.post("/llm/slots/0?action=save", {"filename": "a"}, **key)[0] == 501
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            request = urllib.request.Request(f"{server.url}/llm/health", headers={"Origin": origin})
            with urllib.request.urlopen(request) as answer:
                got = answer.headers.get("access-control-allow-origin")
            assert got == (origin if allowed else None)


def test_the_queue_is_bounded(chat_file: Path, tmp_path: Path) -> None:
    with live(chat_file, tmp_path, "-np", 1, "--queue", 1, "-c", 1024) as server:
        body = {
            "prompt": "import ",
            "n_predict": 900,
            "ignore_eos": True,
            "speculative": {"enabled": False},
        }
        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(lambda _: server.post("/completion", body)[0], range(6)))
        assert sorted(found)[:2] == [200, 200]
        assert found.count(429) >= 2
        assert set(found) == {200, 429}


class TestProcess:
    def test_503_while_loading_and_a_clean_end(self, chat_file: Path, tmp_path: Path) -> None:
        fifo = tmp_path / "slow.gguf"
        os.mkfifo(fifo)
        with live(fifo, tmp_path, ready=False) as server:
            for _ in range(200):
                try:
                    status, text = server.get("/health")
                    break
                except OSError:
                    time.sleep(0.05)
            assert status == 503
            assert "Loading" in json.loads(text)["error"]["message"]
            status, _ = server.post("/v1/messages", {})
            assert status == 503

    def test_ctrl_c_lets_answers_end(self, chat_file: Path, tmp_path: Path) -> None:
        with live(chat_file, tmp_path, "-c", 2048) as server, ThreadPoolExecutor() as threads:
            body = {
                "prompt": "import ",
                "n_predict": 1500,
                "ignore_eos": True,
                "speculative": {"enabled": False},
            }
            answer = threads.submit(server.post, "/completion", body)
            while not json.loads(server.get("/slots")[1])[0]["is_processing"]:
                pass
            assert server.end() == 0
            status, found = answer.result()
            assert (status, found["tokens_predicted"]) == (200, 1500)
            assert "once more" in server.said()

    def test_the_second_does_not(self, chat_file: Path, tmp_path: Path) -> None:

        with live(chat_file, tmp_path, "-c", 2048) as server, ThreadPoolExecutor() as threads:
            body = {
                "prompt": "import ",
                "n_predict": 1900,
                "ignore_eos": True,
                "speculative": {"enabled": False},
            }
            answer = threads.submit(server.post, "/completion", body)
            while not json.loads(server.get("/slots")[1])[0]["is_processing"]:
                pass
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert server.end() == 130
            with pytest.raises((OSError, ValueError)):
                answer.result()
            assert "Traceback" not in server.said()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--api-key-file", "/nowhere/keys"), "--api-key-file /nowhere/keys"),
            (("--slot-save-path", "/nowhere"), "--slot-save-path /nowhere: no such folder"),
            (("--api-prefix", "llm"), "must begin with /"),
            (("--ssl-key-file", "x"), "belong together"),
            (("--host", "192.0.2.1"), "cannot listen there"),
            (("--strategy", "two-pass", "--draft-width", "99"), "--draft-width 99"),
            (("-c", "100000000"), "does not fit"),
        ],
    )
    def test_what_cannot_be_is_one_line(
        self, chat_file: Path, tmp_path: Path, flags: tuple[str, ...], message: str
    ) -> None:
        with live(chat_file, tmp_path, *flags, ready=False) as server:
            assert server.process.wait(60) == 1
            (line,) = [s for s in server.said().splitlines() if "error" in s]
            assert message in line
            assert "Traceback" not in server.said()

    def test_a_port_that_is_taken(self, chat_file: Path, tmp_path: Path) -> None:
        with live(chat_file, tmp_path, ready=False) as first:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", first.port)) == 0:
                        break
                time.sleep(0.05)
            with live(chat_file, tmp_path, "--port", first.port, ready=False) as second:
                assert second.process.wait(60) == 1
                assert "choose another --host or --port" in second.said()
