"""Two replicas behind Ray Serve, on two machines that are this one. A replica is killed under load,
and a machine fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from live_server import chat_model, free_port

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

REPLICA = "x-orthrus-replica"
PROMPTS = ("import ", "def read(self):\n" * 9, "class A:\n", "import os\n" * 40 + "def f(")


@dataclass
class Answer:
    """What came of a request; replica: who answered."""

    status: int
    text: str
    replica: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Cluster:
    """An application that runs."""

    url: str
    arguments: dict[str, Any]
    machines: Any
    other: Any

    def get(self, path: str, **headers: str) -> Answer:
        return self._call(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        data = json.dumps(body).encode()
        return self._call(urllib.request.Request(self.url + path, data, headers, method="POST"))

    @staticmethod
    def _call(request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return Answer(answer.status, answer.read().decode(), answer.headers.get(REPLICA))
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())

    def slots(self) -> list[Any]:
        found: list[Any] = self.get("/slots").json
        return found

    def replicas(self) -> list[str]:
        return sorted({slot["replica"] for slot in self.slots()})

    def deploy(self, **changes: Any) -> None:
        from ray import serve

        from orthrus_gguf.cluster.app import build

        serve.run(build({**self.arguments, **changes}))


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(checkpoint, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    """Two machines, as far as Ray can tell: each has a core, on which there is a replica."""
    from ray import serve
    from ray.cluster_utils import Cluster as Machines

    port, memory = free_port(), 80 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": memory}
        machines = Machines(initialize_head=True, head_node_args=head)
        try:
            other = machines.add_node(num_cpus=1, object_store_memory=memory)
            ray.init(address=machines.address)
            serve.start("HeadOnly", {"host": "127.0.0.1", "port": port})  # there is but one port
            arguments = {"model": model, "replicas": 2, "c": 1024, "metrics": True, "drain": 60}
            found = Cluster(f"http://127.0.0.1:{port}", arguments, machines, other)
            found.deploy()
            until(lambda: found.get("/health").status == 200)
            until(lambda: len(found.replicas()) == 2)
            yield found
            serve.shutdown()
        finally:
            ray.shutdown()
            machines.shutdown()


def kill(name: str) -> None:
    """A replica by its name, or the door."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    (actor,) = [found for found in actors if f"#{name}" in found["name"]]
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def requests(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "max_tokens": 40,
            "seed": index,
            "temperature": 0.8,
            "ignore_eos": True,
        }
        for index in range(count)
    ]


def said(answer: Answer) -> str:
    assert answer.status == 200, answer.text
    (choice,) = answer.json["choices"]
    return str(choice["text"])


def test_the_text_is_orthrus_runs_whoever_answers(cluster: Cluster, model: Path) -> None:
    for index, body in enumerate(requests(4)):
        flags = ["-t", "1", "--json", "--raw", "-n", "40", "-s", str(index), "--temp", "0.8"]
        command = [sys.executable, "-m", "orthrus_gguf.cli.run", str(model), *flags]
        command += ["-p", body["prompt"], "--ignore-eos"]
        told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for name in cluster.replicas():
            answer = cluster.post("/v1/completions", body, **{REPLICA: name})
            assert answer.replica == name
            assert said(answer) == told["text"]


@dataclass
class Conversation:
    """One of two turns."""

    cluster: Cluster
    first: str

    def __post_init__(self) -> None:
        self.messages = [{"role": "user", "content": f"class {self.first}:\n" * 5}]
        answer = self.ask()
        self.home, self.known = answer.replica, answer.json["usage"]["prompt_tokens"]
        self.messages.append(answer.json["choices"][0]["message"])

    def ask(self) -> Answer:
        body = {"messages": self.messages, "max_tokens": 30, "temperature": 0}
        return self.cluster.post("/v1/chat/completions", body)

    def goes_on_at_home(self) -> None:
        self.messages.append({"role": "user", "content": "def f("})
        answer = self.ask()
        assert answer.replica == self.home
        cached = answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= self.known - 1


def test_a_conversation_meets_its_cache(cluster: Cluster) -> None:
    begun = [Conversation(cluster, f"Number{number}") for number in range(4)]
    assert len({conversation.home for conversation in begun}) == 2
    for conversation in begun:
        conversation.goes_on_at_home()


def test_a_new_door_learns_what_the_replicas_hold(cluster: Cluster) -> None:
    begun = [Conversation(cluster, f"Letter{letter}") for letter in "abcd"]
    time.sleep(6)  # two reports, and their way
    kill("Door")
    until(lambda: cluster.get("/health").status == 200)
    until(lambda: len(cluster.replicas()) == 2)
    for conversation in begun:
        conversation.goes_on_at_home()


def test_a_client_that_goes_away_ends_its_answer(cluster: Cluster) -> None:
    body = {"prompt": "import ", "max_tokens": 900, "ignore_eos": True, "stream": True}
    body |= {"speculative": {"strategy": "ar"}}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{cluster.url}/v1/completions", data, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        name = answer.headers[REPLICA]
        assert answer.readline().startswith(b"data: ")
    until(lambda: not any(slot["is_processing"] for slot in cluster.slots()), 10)
    held = max(slot["n_held"] for slot in cluster.slots() if slot["replica"] == name)
    assert held < 800


def test_counters_are_each_replicas_own(cluster: Cluster) -> None:
    def count(name: str) -> float:
        lines = cluster.get("/metrics").text.splitlines()
        start = f'llamacpp:tokens_predicted_total{{replica="{name}"}} '
        (line,) = [line for line in lines if line.startswith(start)]
        return float(line.removeprefix(start))

    one, other = cluster.replicas()
    before = count(one), count(other)
    said(cluster.post("/v1/completions", requests(1)[0], **{REPLICA: one}))
    assert (count(one), count(other)) == (before[0] + 40, before[1])


@dataclass
class Load:
    """Clients that ask without an end. `failed`: what was no whole answer; `wrong`: texts that
    should be others; `done`: whole answers."""

    cluster: Cluster
    texts: list[str]

    def __post_init__(self) -> None:
        self.over = threading.Event()
        self.failed: list[Answer] = []
        self.wrong, self.done = 0, 0

    def ask(self, client: int) -> None:
        for turn in range(10**6):
            if self.over.is_set():
                return
            index = (client + turn) % len(self.texts)
            body = requests(len(self.texts))[index]
            streamed = turn % 2 == 1
            answer = self.cluster.post("/v1/completions", {**body, "stream": streamed})
            if answer.status != 200 or '"error"' in answer.text:
                self.failed.append(answer)
                continue
            text = said(answer) if not streamed else streamed_text(answer.text)
            self.wrong += text != self.texts[index]
            self.done += 1


def streamed_text(events: str) -> str:
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_a_killed_replicas_answers(cluster: Cluster) -> None:
    """One that was being streamed ends with an error, one of which nothing was said is given by the
    other replica."""
    body = {"prompt": "class Killed:\n", "max_tokens": 950, "ignore_eos": True, "seed": 1}
    body |= {"speculative": {"strategy": "ar"}, "logprobs": 5}
    text, home = said(first := cluster.post("/v1/completions", body)), first.replica
    assert home is not None
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(cluster.post, "/v1/completions", {**body, "stream": True})
        whole = pool.submit(cluster.post, "/v1/completions", body)
        until(lambda: sum(slot["is_processing"] for slot in cluster.slots()) == 2, 10)
        assert {s["replica"] for s in cluster.slots() if s["is_processing"]} == {home}
        kill(home)
    broken, answer = streamed.result(), whole.result()
    assert (broken.status, broken.replica) == (200, home)
    assert "the replica that answered died; ask again" in broken.text.splitlines()[-2]
    assert "[DONE]" not in broken.text
    assert answer.replica != home
    assert said(answer) == text
    until(lambda: len(cluster.replicas()) == 2)


def test_one_is_killed_under_load(cluster: Cluster) -> None:
    texts = [said(cluster.post("/v1/completions", body)) for body in requests(8)]
    load, before = Load(cluster, texts), cluster.replicas()
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load.ask, number) for number in range(8)]
        try:
            until(lambda: load.done > 20)
            kill(before[0])
            done = load.done
            until(lambda: load.done > done + 20)  # the other one goes on
            until(lambda: len(cluster.replicas()) == 2 and before[0] not in cluster.replicas())
        finally:
            load.over.set()
        for client in clients:
            client.result()
    assert load.wrong == 0
    for answer in load.failed:  # those that it had begun to stream, and no others
        assert answer.status == 200
        assert "the replica that answered died; ask again" in answer.text
    assert len(load.failed) <= 8
    (new,) = {*cluster.replicas()} - {*before}
    assert said(cluster.post("/v1/completions", requests(1)[0], **{REPLICA: new})) == texts[0]


def test_replicas_are_exchanged_one_after_another(cluster: Cluster) -> None:
    texts = [said(cluster.post("/v1/completions", body)) for body in requests(8)]
    load, before = Load(cluster, texts), cluster.replicas()
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(load.ask, number) for number in range(4)]
        try:
            cluster.deploy(alias="newer", queue=2)
            until(lambda: not {*cluster.replicas()} & {*before})
        finally:
            load.over.set()
        for client in clients:
            client.result()
    assert (load.wrong, load.failed) == (0, [])
    assert load.done > 20
    assert cluster.get("/v1/models").json["data"][0]["id"] == "newer"


def test_more_than_may_wait_hear_so(cluster: Cluster) -> None:
    """Of the test before: two replicas with a queue of 2 each."""
    body = {**requests(1)[0], "max_tokens": 300}
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: cluster.post("/v1/completions", body), range(60)))
    assert {answer.status for answer in answers} == {200, 429}
    (text,) = {said(answer) for answer in answers if answer.status == 200}
    assert text
    refused = [answer.json["error"] for answer in answers if answer.status == 429]
    assert {error["type"] for error in refused} == {"rate_limit_error"}


def test_the_usual_clients(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        chunks = client.chat.completions.create(
            model="newer",
            messages=[{"role": "user", "content": "import "}],
            max_tokens=9,
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        with pytest.raises(openai.BadRequestError, match="n: "):
            client.completions.create(model="newer", prompt="x", n=-1)
    with anthropic.Anthropic(base_url=cluster.url, api_key="none") as claude:
        message = {"role": "user", "content": "import "}
        with claude.messages.stream(model="newer", max_tokens=9, messages=[message]) as stream:  # type: ignore[list-item]
            assert stream.get_final_message().usage.output_tokens == 9


def test_replicas_follow_the_load(cluster: Cluster) -> None:
    cluster.deploy(replicas=1, parallel=2)  # they go in their own time where fewer would do
    cluster.deploy(replicas="1..2", parallel=2)
    until(lambda: len(cluster.replicas()) == 1)
    texts = [said(cluster.post("/v1/completions", body)) for body in requests(8)]
    load = Load(cluster, texts)
    with ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(load.ask, number) for number in range(12)]
        try:
            until(lambda: len(cluster.replicas()) == 2, 120)
        finally:
            load.over.set()
        for client in clients:
            client.result()
    assert (load.wrong, load.failed) == (0, [])


def test_a_machine_fails(cluster: Cluster) -> None:
    """What was under way there fails or is answered by the other; that goes on."""
    cluster.deploy(doors=2)
    until(lambda: len(cluster.replicas()) == 2)
    texts = [said(cluster.post("/v1/completions", body)) for body in requests(8)]
    load = Load(cluster, texts)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(load.ask, number) for number in range(4)]
        try:
            until(lambda: load.done > 10)
            cluster.machines.remove_node(cluster.other, allow_graceful=False)
            until(lambda: len(cluster.replicas()) == 1)
            done = load.done
            until(lambda: load.done > done + 20)
        finally:
            load.over.set()
        for client in clients:
            client.result()
    assert load.wrong == 0
    for answer in load.failed:  # also those of the door that was there
        assert answer.status >= 500 or "died" in answer.text
