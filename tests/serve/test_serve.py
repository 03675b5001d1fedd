"""The search service over real sockets: answers, writes, refusals, ends; and its parts."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(__file__))

import hostile
from served import TOKEN, Client, Process, file_of, make_store, picture

from relreid_plugin.cli.main import main
from relreid_plugin.data.table import read_table
from relreid_plugin.errors import UserError
from relreid_plugin.serve.batching import Batcher, Busy
from relreid_plugin.serve.feedback import Answer, Journal, training_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def words(folder):
    return make_store(folder)


@pytest.fixture(scope="module")
def client(words):
    """A service in this process, with the limits that the hostile requests are made for."""
    pytest.importorskip("fastapi")
    from relreid_plugin.cli.serve import SERVE, _opened
    from relreid_plugin.serve import server
    from relreid_plugin.serve.app import Service, create_app
    from relreid_plugin.serve.guard import Guard, Limits
    from relreid_plugin.serve.metrics import Metrics

    metrics, ready = Metrics(), threading.Event()
    service = Service(_opened(SERVE.parser().parse_args(words)), TOKEN, metrics, pixels=hostile.PIXELS)
    limits = Limits(body=hostile.BODY, seconds=0.5, rate=0)
    app = Guard(create_app(service), limits, metrics, server.allowed_hosts("127.0.0.1", []))
    place = server.listen("127.0.0.1", 0)
    running = server.make_server(app, ready.set)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
    thread.start()
    assert ready.wait(10)
    yield Client(place.getsockname()[1], TOKEN)
    running.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


# --- what is answered -------------------------------------------------------------------------------------------------
def test_hostile_requests_are_refused(client, folder):
    found = hostile.requests(TOKEN)
    assert len(found) >= 200
    wrong = []
    for name, method, path, headers, body, statuses in found:
        status, answered, content = client.raw(method, path, headers, body)
        if status not in statuses:
            wrong.append(f"{name}: {status}, not {statuses}: {content[:150]!r}")
        assert str(folder).encode() not in content, name
    assert not wrong, "\n".join(wrong)
    assert client.ask("GET", "/health") == (200, {"status": "ok", "images": hostile.ROWS})
    assert client.ask("GET", "/api/store")[1]["answers"] == 0


def test_filters_threshold_and_boxes(client, folder):
    whole = client.search(picture(5), k=24)
    assert [item["rank"] for item in whole] == list(range(1, 25)) and whole[0]["row"] == 5
    assert whole[0]["label"] == 2 and whole[0]["camera"] == 1 and whole[0]["name"] == "0002_c1s1_000005_00.png"
    assert [item["row"] for item in client.search(picture(5), k=3, cameras=["1"])] == [
        item["row"] for item in whole if item["camera"] == 1
    ][:3]
    chosen = client.search(picture(5), k=24, labels=["1", "3", "nobody"], cameras=["1"])
    assert sorted(item["row"] for item in chosen) == [0, 1, 8, 9]
    cut = (whole[2]["score"] + whole[3]["score"]) / 2
    assert [item["row"] for item in client.search(picture(5), k=24, threshold=cut)] == [item["row"] for item in whole[:3]]
    sheet = Image.new("RGB", (40, 40))
    sheet.paste(picture(9), (11, 7))
    boxed = client.search(sheet, k=24, box="11,7,19,23")
    assert boxed == client.search(picture(9), k=24) and boxed[0]["row"] == 9


def test_probabilities_are_those_of_the_verifier_whatever_the_order(client):
    for more in ({}, {"rerank": 24}):
        for item in client.search(picture(5), k=24, **more):
            if not more:
                assert item["probability"] == pytest.approx(1 / (1 + np.exp(5 - 10 * item["score"])), abs=1e-5)
            assert item["same"] == (item["row"] == 5)
    plain = {item["row"]: item["probability"] for item in client.search(picture(5), k=24)}
    again = client.search(picture(5), k=24, rerank=24)
    assert {item["row"]: item["probability"] for item in again} == plain and again != client.search(picture(5), k=24)


def test_images_are_filtered_by_when_they_were_taken(client, folder):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[36867] = "2020:05:06 07:08:09"
    path = folder / "photos" / "0003_c1s1_000008_00.png"
    for number, file in enumerate(sorted((folder / "photos").iterdir())):
        os.utime(file, (1e9 + 86400 * number,) * 2)
    picture(8).save(path, "JPEG", exif=exif, quality=100)  # the name says PNG, the content counts
    day = time.strftime("%Y-%m-%dT%H:%M", time.localtime(1e9 + 86400 * 3 - 60))
    last = time.strftime("%Y-%m-%dT%H:%M", time.localtime(1e9 + 86400 * 6 + 60))
    found = client.search(picture(5), k=24, since=day, until=last)
    assert sorted(item["row"] for item in found) == [3, 4, 5, 6]
    found = client.search(picture(5), k=24, since="2020-05-06T07:08:00", until="2020-05-06T07:09:00")
    assert [item["row"] for item in found] == [8]


def test_images_are_served_by_row_and_size(client):
    status, headers, content = client.raw("GET", "/api/images/5?side=32")
    assert status == 200 and headers["content-type"] == "image/jpeg" and headers["x-content-type-options"] == "nosniff"
    from io import BytesIO

    assert Image.open(BytesIO(content)).size == (8, 16)


def test_the_page_loads_nothing_from_elsewhere(client):
    status, headers, content = client.raw("GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
    assert b"http://" not in content and b"https://" not in content and b"@import" not in content
    assert b"src=" not in content.replace(b'src="/api/images/"', b"")


def test_the_api_is_described(client):
    status, described = client.ask("GET", "/openapi.json")
    paths = described["paths"]
    assert status == 200 and set(paths) == {
        "/health", "/metrics", "/api/store", "/api/search", "/api/images", "/api/images/{row}", "/api/feedback",
        "/api/feedback.csv",
    }  # fmt: skip
    assert set(paths["/api/images/{row}"]) == {"get", "delete"}
    form = described["components"]["schemas"][
        paths["/api/search"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["$ref"].split("/")[-1]
    ]
    assert {"image", "box", "k", "relations", "rerank", "cameras", "labels", "since", "until"} <= set(form["properties"])


def test_what_others_write_to_the_store_is_found(words, client, folder):
    more = folder / "more"
    more.mkdir()
    picture(700).save(more / "0077_c1s1_000000_00.png")
    before = client.ask("GET", "/health")[1]["images"]
    assert main(["extract", words[2], words[0], str(more), "--size", "16x8"]) == 0
    until = time.monotonic() + 10
    while client.search(picture(700), k=1)[0]["label"] != 77 and time.monotonic() < until:
        time.sleep(0.05)
    assert client.search(picture(700), k=1)[0]["name"] == "0077_c1s1_000000_00.png"
    row = client.search(picture(700), k=1)[0]["row"]
    assert client.ask("DELETE", f"/api/images/{row}")[0] == 204
    assert client.ask("GET", "/health")[1]["images"] == before
    assert (more / "0077_c1s1_000000_00.png").is_file()  # somebody else's


def test_enrolled_and_deleted(client, folder):
    before = client.ask("GET", "/health")[1]["images"]
    status, made = client.ask("POST", "/api/images", picture(900), label="anna", camera="yard", time="2021-02-03T04:05")
    assert status == 201 and made["new"]
    assert client.ask("POST", "/api/images", picture(900), label="bert") == (200, {"row": made["row"], "new": False})
    (found,) = client.search(picture(900), k=1, labels=["anna"], cameras=["yard"], since="2021-02-03", until="2021-02-04")
    assert found["row"] == made["row"] and found["label"] == "anna" and found["camera"] == "yard"
    assert "yard" in client.ask("GET", "/api/store")[1]["cameras"]
    files = list((folder / "store" / "serve" / "enrolled").iterdir())
    assert [file.name for file in files] == [found["name"]]
    assert client.ask("DELETE", f"/api/images/{made['row']}")[0] == 204
    assert not files[0].exists()
    assert client.ask("DELETE", f"/api/images/{made['row']}")[0] == 404
    assert client.raw("GET", f"/api/images/{made['row']}")[0] == 404
    assert made["row"] not in [item["row"] for item in client.search(picture(900), k=100)]
    assert client.ask("GET", "/health")[1]["images"] == before
    status, again = client.ask("POST", "/api/images", picture(900), label="bert")
    assert status == 201 and again["row"] > made["row"] and client.search(picture(900), k=1)[0]["label"] == "bert"


def test_many_writers_at_once(client):
    before = client.ask("GET", "/health")[1]["images"]
    with ThreadPoolExecutor(8) as pool:
        numbers = list(range(950, 966)) * 2
        made = list(pool.map(lambda n: client.ask("POST", "/api/images", picture(n), label=f"w{n}"), numbers))
    rows = {number: answer["row"] for number, (_, answer) in zip(numbers, made)}
    assert sum(answer["new"] for _, answer in made) == len(set(rows.values())) == 16
    assert all(client.search(picture(number), k=1)[0]["row"] == row for number, row in rows.items())
    with ThreadPoolExecutor(8) as pool:
        gone = list(pool.map(lambda row: client.ask("DELETE", f"/api/images/{row}")[0], rows.values()))
    assert gone == [204] * 16 and client.ask("GET", "/health")[1]["images"] == before


def test_the_counters(client):
    client.search(picture(1), k=1)
    text = client.raw("GET", "/metrics")[2].decode()
    count = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    client.search(picture(1), k=1)
    later = client.raw("GET", "/metrics")[2].decode()
    route = 'relreid_requests_total{method="POST",route="/api/search",status="200"}'
    assert f"{route} {count[route] + 1}" in later
    assert f"relreid_batch_count {count['relreid_batch_count'] + 1}" in later
    assert count["relreid_images"] == client.ask("GET", "/health")[1]["images"]
    assert TOKEN not in later


def test_a_slow_request_is_given_up(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as place:
        place.sendall(b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        assert b" 408 " in place.recv(1000).split(b"\r\n")[0]


# --- processes --------------------------------------------------------------------------------------------------------
def test_a_service_that_is_killed_loses_nothing(tmp_path, capsys):
    """Several clients at once get what ``relreid search`` finds; then it is killed while it writes, and comes back."""
    words = make_store(tmp_path)
    queries = tmp_path / "queries"
    queries.mkdir()
    for number in range(12):
        Image.blend(picture(number), picture(100 + number), 0.4).save(queries / f"{number:02d}.png")
    model = [words[2], words[0], str(queries), "--size", "16x8", "-k", "5"]
    wanted = {}
    for name, more in (("plain", []), ("again", ["--rerank", "12"])):
        assert main(["search", *model, *more, "--out", str(tmp_path / name)]) == 0
        wanted[name] = json.loads((tmp_path / name / "ranking.json").read_text())["queries"]
    capsys.readouterr()
    first = Process(words)
    acknowledged: list[tuple[int, int]] = []
    try:

        def compare(job):
            name, number = job
            item = wanted[name][number]
            with open(item["query"], "rb") as file:
                found = first.client.search(file.read(), k=5, rerank=12 if name == "again" else 0)
            assert [each["row"] for each in found] == [each["row"] for each in item["results"]]
            scores = [[each["score"] for each in results] for results in (found, item["results"])]
            np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(compare, [(name, number) for name in wanted for number in range(12)] * 2))
        assert first.client.ask("DELETE", "/api/images/3")[0] == 204

        def enrol(number):
            try:
                image = picture(500 + number)
                status, made = first.client.ask("POST", "/api/images", image, label=f"p{number}")
                if status == 201:
                    status, _ = first.client.ask("POST", "/api/feedback", image, row=made["row"], same="true")
                    acknowledged.append((number, made["row"] if status == 201 else -1))
            except (OSError, ValueError):
                pass
            if len(acknowledged) >= 6:
                first.process.send_signal(signal.SIGKILL)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(enrol, range(40)))
        assert 6 <= len(acknowledged) < 40 and first.process.wait(10) == -signal.SIGKILL
        assert not any("multipart" in line or "PNG" in line or TOKEN in line for line in first.log)
        assert any('"POST /api/search" 200' in line for line in first.log)
    finally:
        first.end()
    second = Process(words)
    try:
        for number, row in acknowledged:
            best = second.client.search(picture(500 + number), k=1)[0]
            assert best["label"] == f"p{number}" and row in (-1, best["row"])
        assert 3 not in [item["row"] for item in second.client.search(picture(3), k=100)]
        pairs = second.client.ask("GET", "/api/feedback.csv?form=pairs")[1].decode()
        assert pairs.count("\n") - 1 >= sum(row >= 0 for _, row in acknowledged)
        assert main(["serve", words[0], "--model", words[2], "--size", "16x8", "--port", "0"]) == 2
        assert "is being written by another process" in capsys.readouterr().err
        # SIGTERM: what was begun is finished
        body = hostile.form(file_of(picture(5)), k=1)
        with socket.create_connection(("127.0.0.1", second.client.port), timeout=20) as place:
            head = f"POST /api/search HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n"
            place.sendall(f"{head}Content-Type: {hostile.FORM['Content-Type']}\r\n\r\n".encode())
            assert place.recv(1000).startswith(b"HTTP/1.1 100")
            second.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            place.sendall(body)
            answer = b""
            while part := place.recv(10_000):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200") and b'"row":5' in answer
        assert second.process.wait(20) == 0
        with pytest.raises(OSError):
            second.client.raw("GET", "/health")
    finally:
        second.end()


def test_addresses_and_tokens(words, folder, monkeypatch, capsys):
    monkeypatch.delenv("RELREID_TOKEN", raising=False)

    def refused(*more):
        assert main(["serve", *words, *more]) == 2
        return capsys.readouterr().err

    assert "give a token by RELREID_TOKEN or --token-file" in refused("--host", "0.0.0.0")
    assert "give a token by RELREID_TOKEN or --token-file" in refused("--host", "::")
    monkeypatch.setenv("RELREID_TOKEN", "short")
    assert "has 5 characters; give it 16 or more" in refused()
    (folder / "empty").write_text("\n")
    assert "is empty; give a token" in refused("--token-file", str(folder / "empty"))
    assert "cannot be read" in refused("--token-file", str(folder / "missing"))
    monkeypatch.delenv("RELREID_TOKEN")
    assert "cannot listen to 192.0.2.1:8008" not in refused("--host", "192.0.2.1")  # the token is asked for first
    assert main(["serve", words[0]]) == 2 and "by --model" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused("--port", str(taken.getsockname()[1]))
    assert "has no answers" in refused("--export", str(folder / "x.csv")) and not (folder / "x.csv").exists()


def test_names_that_a_service_goes_by():
    server = pytest.importorskip("relreid_plugin.serve.server")
    assert server.allowed_hosts("127.0.0.1", []) == {"localhost", "127.0.0.1", "::1"}
    assert "search.lan" in server.allowed_hosts("192.0.2.1", ["Search.lan"])
    assert not server.allowed_hosts("0.0.0.0", []) and "a" in server.allowed_hosts("0.0.0.0", ["a"])
    assert server.is_loopback("127.9.9.9") and server.is_loopback("::1") and server.is_loopback("localhost")
    assert not server.is_loopback("0.0.0.0") and not server.is_loopback("::")
    token, made = server.find_token("127.0.0.1", None) if not os.environ.get("RELREID_TOKEN") else ("x" * 32, True)
    assert made and len(token) >= 32


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "python_multipart", "prometheus_client", "limits"])
def test_without_the_extra_one_sentence_says_what_to_install(module, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["serve", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and module.replace("_", "-") in said and "pip install" in said


def test_a_client_that_asks_too_often_waits():
    pytest.importorskip("limits")
    import asyncio

    from relreid_plugin.serve.guard import Guard, Limits
    from relreid_plugin.serve.metrics import Metrics

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, Limits(rate=3), Metrics(), frozenset())

    async def ask(method, client):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "headers": [], "client": (client, 1), "raw_path": b"/x"}
        await guard(scope, receive, send)
        return sent[0]

    async def both():
        posts = [(await ask("POST", "a"))["status"] for _ in range(5)]
        late = dict((await ask("POST", "a"))["headers"])
        return posts, late, (await ask("POST", "b"))["status"], [(await ask("GET", "a"))["status"] for _ in range(32)]

    posts, late, other, reads = asyncio.run(both())
    assert posts == [200] * 3 + [429] * 2 and 1 <= int(late[b"retry-after"]) <= 120 and other == 200
    assert reads == [200] * 30 + [429] * 2


# --- relations --------------------------------------------------------------------------------------------------------
def test_relations_and_cameras_reach_the_search(tmp_path):
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "search"))
    from test_search import clusters, make_encoder

    from relreid_plugin.metrics.neighbours import SearchConfig
    from relreid_plugin.metrics.rivals import rival_named
    from relreid_plugin.search import GallerySearcher, StoreWriter
    from relreid_plugin.serve.gallery import ServedGallery, Wish

    encoder = make_encoder()

    class Extractor:
        fingerprint, pixel_range, name_pattern = "", None, None

        def encoder(self):
            return encoder

        def rerank_settings(self, name):
            return rival_named(name), rival_named(name).protocol("published"), {}

    rows = clusters(6, seed=1)
    with StoreWriter(tmp_path / "s", dim=16) as writer:
        writer.add(rows, np.arange(90) % 15, np.arange(90) % 4)
    served = ServedGallery(tmp_path / "s", Extractor(), SearchConfig(), relations=True)
    query = clusters(1, seed=2)[4:5]
    found = served.search(query[0], Wish(k=9, relations=True))["results"]
    wanted = GallerySearcher(tmp_path / "s", encoder=encoder).search(query, 9)
    assert [item["row"] for item in found] == wanted.rows[0].tolist()
    assert found != served.search(query[0], Wish(k=9))["results"]
    found = served.search(query[0], Wish(k=9, rerank=30, by="cajaccard", camera="2"))["results"]
    wanted = GallerySearcher(tmp_path / "s").search(query, 9, rerank=30, by="cajaccard", camids=[2])
    assert [item["row"] for item in found] == wanted.rows[0].tolist()
    np.testing.assert_allclose([item["score"] for item in found], wanted.scores[0].numpy(), atol=1e-6)
    with pytest.raises(UserError, match="offers no relations"):
        ServedGallery(tmp_path / "s", Extractor(), SearchConfig()).search(query[0], Wish(relations=True))


# --- parts ------------------------------------------------------------------------------------------------------------
def test_what_waits_is_done_together():
    sizes, hold, begun = [], threading.Event(), threading.Event()

    def work(items):
        sizes.append(len(items))
        begun.set()
        hold.wait(10)
        return [ValueError(str(item)) if item == 13 else 2 * item for item in items]

    batcher = Batcher(work, most=4, waiting=14)
    first = batcher.submit(0)
    assert begun.wait(10)
    later = [batcher.submit(item) for item in range(1, 15)]
    with pytest.raises(Busy):
        batcher.submit(99)
    later[4].cancel()
    hold.set()
    assert first.result(10) == 0 and [each.result(10) for each in later[:4]] == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="13"):
        later[12].result(10)
    batcher.close()
    assert later[13].result(0) == 28 and sizes == [1, 4, 3, 4, 2]
    with pytest.raises(Busy):
        batcher.submit(1)


def test_a_batch_that_fails_fails_for_all_of_it():
    def work(items):
        raise KeyError("lost")

    batcher = Batcher(work, most=4)
    with pytest.raises(KeyError):
        batcher.submit(1).result(10)
    batcher.close()


def answer(query, image, same=True, label=-1, camera=-1, query_camera=-1):
    return Answer(str(query), str(image), 0, same, label, camera, query_camera, "2024-01-01T00:00:00+00:00")


def test_a_journal_keeps_what_was_whole(tmp_path):
    path = tmp_path / "deep" / "feedback.jsonl"
    journal = Journal(path)
    journal.add([answer("q", "a"), answer("q", "b")])
    journal.add([answer("q", "a", same=False)])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"query": "q", "ima')  # a killed writer's
    again = Journal(path)
    assert len(again) == 2 and [each.same for each in again.answers()] == [False, True]
    again.add([answer("r", "a")])
    lines = path.read_bytes()[len(whole) :].splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["query"] == "r" and len(Journal(path)) == 3
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="line 1 is no answer"):
        Journal(path)


def test_answers_become_a_data_set(tmp_path):
    for name in "abcdefghijklmnop":
        picture(ord(name)).save(tmp_path / f"{name}.png")
    at = {name: str(tmp_path / f"{name}.png") for name in "abcdefghijklmnop"}

    def said(*all_of_them):
        return [answer(at[one], at[two], same, *more) for one, two, same, *more in all_of_them]

    answers = said(
        ("a", "b", True, 7, 1, 2),  # a, b, c: identity 7
        ("a", "c", True, -1, 1, 2),
        ("a", "d", False, 8, 1, 2),  # d is alone
        ("e", "f", True, -1, 3, 1),  # e, f, g: a new identity
        ("g", "f", True, -1, 3, 2),
        ("h", "i", True, 9, 1, 1),  # h is two of the store's identities at once
        ("h", "j", True, 10, 1, 1),
        ("k", "l", True, -1, 1, 1),  # k and m are the same by l, and are said to be different
        ("m", "l", True, -1, 1, 1),
        ("m", "k", False, -1, 1, 1),
        ("n", "o", True, 7, 3, 3),  # another image of identity 7
    )
    table, notes = training_table(answers)
    rows = {line.split(",")[0][-5]: line.split(",")[1:] for line in table.splitlines()[1:]}
    assert table.startswith("path,pid,camid,split\n") and set(rows) == set("abcefgno")
    assert {rows[name][0] for name in "abcno"} == {"7"} and len({rows[name][0] for name in "efg"}) == 1
    assert rows["e"][0].startswith("feedback-") and rows["a"][1] == "2" and rows["c"][1] == "1" and rows["f"][1] == "3"
    assert notes[0].startswith("1 groups") and notes[1].startswith("1 groups") and notes[2].startswith("1 pictures")
    tested = [name for name in rows if rows[name][2] != "train"]
    assert set(tested) in (set("abcno"), set("efg"))
    assert {rows[name][2] for name in tested if name in "aegn"} == {"query"}
    (tmp_path / "t.csv").write_text(table)
    made = read_table(tmp_path / "t.csv")
    assert len(made.train) + len(made.query) + len(made.gallery) == 8
    lost, notes = training_table(said(("a", "b", True, 7, -1, 2), ("a", "d", False, 8, 1, 2)))
    assert lost.startswith("path,pid,split\n") and "there is no camid, as some cameras are unknown" in notes
    assert any("no image is in query or gallery" in note for note in notes)
    assert training_table([])[0] == "path,pid,camid,split\n"


def test_the_forward_pass_is_one_for_requests_that_wait(words):
    pytest.importorskip("fastapi")
    from relreid_plugin.cli.serve import SERVE, _opened
    from relreid_plugin.serve.app import Service
    from relreid_plugin.serve.metrics import Metrics

    service = Service(_opened(SERVE.parser().parse_args(words)), TOKEN, Metrics())
    network, sizes, hold = service.gallery.extractor.extractor, [], threading.Event()
    whole = network.forward

    def forward(pixels):
        sizes.append(len(pixels))
        hold.wait(10)
        return whole(pixels)

    network.forward = forward
    pixels = [network.pixels(picture(number)) for number in range(6)]
    futures = [service._forward.submit(pixels[0])]
    while not sizes:
        time.sleep(0.001)
    futures += [service._forward.submit(each) for each in pixels[1:]]
    hold.set()
    made = torch.stack([each.result(10) for each in futures])
    assert sizes == [1, 5]
    torch.testing.assert_close(made, whole(np.stack(pixels)), rtol=0, atol=1e-5)
    service.close()
    assert service.knows(TOKEN) and not service.knows(TOKEN[:-1]) and not service.knows("")
