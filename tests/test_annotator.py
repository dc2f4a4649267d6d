"""ANNOTATOR="api" against a server of this machine that answers well, badly, and dies midway."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request

import numpy as np
import pytest
from helpers import refused
from test_real_data import clips, constants, generate, shot_of, world  # noqa: F401

import generate_data as gd
from lib import annotator


class Annotator(BaseHTTPRequestHandler):
    """Answers as a good model would, after the troubles that the test has put on the server."""

    def do_POST(self):
        """Takes a trouble from the list, or replies to the prompt."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][0]["text"]
        with self.server.lock:
            self.server.asked.append(
                (text, len(body["messages"][0]["content"]) - 1, self.headers["Authorization"])
            )
            troubles = self.server.troubles.get(kind_of(text))
            trouble = troubles.pop(0) if troubles else None
            if self.server.dies_after is not None and len(self.server.asked) > self.server.dies_after:
                trouble = 500
        if isinstance(trouble, int):
            self.send_error(trouble)
            return
        if trouble in ("redirect", "endless", "drip"):
            self.never_end(trouble)
            return
        if trouble == "slow":
            time.sleep(1.5)
        content = reply_to(text) if not callable(trouble) else trouble(reply_to(text))
        reply = {"choices": [{"message": {"content": content}}], "usage": {"total_tokens": 7}}
        data = json.dumps(reply).encode()
        data = data[: len(data) // 2] if trouble == "truncated" else data
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def never_end(self, trouble):
        """Sends the client elsewhere, or replies with more and more, a lot or a little at a time."""
        if trouble == "redirect":
            self.send_response(302)
            self.send_header("Location", self.server.elsewhere)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # until the client has gone, or the test is over
            for _ in range(40 if trouble == "drip" else 400):
                self.wfile.write(b" " if trouble == "drip" else b" " * 2**17)
                self.wfile.flush()
                time.sleep(0.1 if trouble == "drip" else 0)

    def do_GET(self):
        """What a redirect leads to: it must not be asked."""
        self.server.asked.append(("GET", 0, self.headers["Authorization"]))
        self.send_error(404)

    def log_message(self, *words):
        """Keeps quiet."""


def kind_of(text):
    """Which of the three prompts of assets/ a text was made from."""
    return "landmarks" if "static_object" in text else "check" if "numbered from 0" in text else "thought"


def reply_to(text):
    """The good reply to each of the three prompts."""
    if kind_of(text) == "landmarks":
        return '```json\n{"static_object": "tall yellow box", "dynamic_object": "small round ball"}\n```'
    if kind_of(text) == "check":
        return json.dumps({"valid": list(range(int(re.search(r"These are (\d+)", text)[1])))})
    answer = re.search(r"The right answer is: (.*)", text)[1]
    count = int(re.search(r"exactly (\d+) times", text)[1])
    seen = " ".join(f"View {n} is <output_image>." for n in range(count))
    return f"<think>{seen} They differ, so it is {answer[3:]}.</think>\n<answer>{answer}</answer>"


@pytest.fixture
def server():
    """The annotator on a free port; `url` is its address."""
    server = ThreadingHTTPServer(("", 0), Annotator)
    server.asked, server.troubles, server.lock, server.dies_after = [], {}, threading.Lock(), None
    server.url = f"http://{'local' + 'host'}:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


FAST = ("ANNOTATOR=api", "MODEL=stub", "WAITS=(0, 0.01, 0.02, 0.04)", "TIMEOUT=1.0")


def test_troubles_never_reach_a_file(server, world, monkeypatch, tmp_path, capsys):  # noqa: F811
    """429, 500, a slow and a truncated reply are repeated; bad words, tags, answers are asked for again."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-1234")
    server.troubles = {
        "landmarks": [429, 500, "slow"],
        "check": ["truncated", lambda text: "I cannot see any."],
    }
    server.troubles["check"] += [lambda text: '{"valid": [0, 99]}']
    server.troubles["thought"] = [
        lambda text: text.replace("<output_image>", "", 1),
        lambda text: re.sub(r"<answer>.", "<answer>E", text),
        lambda text: text.replace("</think>", ""),  # the third bad one in a row: the row is dropped
    ]
    rows = generate(monkeypatch, world, tmp_path / "out", f"BASE_URL={server.url}", *FAST, "WORKERS=1")
    everything = rows["train"] + rows["test"]
    told = capsys.readouterr().out
    count = len(server.asked) - 4
    assert re.search(rf"annotator: {count} requests, {7 * count} tokens, \d+\.\d requests/s/worker", told), (
        told
    )
    captions = [text for text, _, _ in server.asked if kind_of(text) == "landmarks"]
    assert captions and all("agree: A plain.\n" in text and "It moves" not in text for text in captions)
    assert all("View 0 is <output_image>" in row["text_output"] for row in everything)
    thoughts = sum("imagined" in text for text, _, _ in server.asked)
    assert thoughts == len(everything) + 3 and "dropped: 1 rows have no valid reasoning" in told
    assert all(0 < images <= 10 for _, images, _ in server.asked)
    assert {key for _, _, key in server.asked} == {"Bearer secret-key-1234"}
    for path in (tmp_path / "out").rglob("*.json*"):
        assert "secret-key" not in path.read_text() and "cannot see" not in path.read_text()
    for row in everything:
        assert row["subtask"].startswith("camera") or "small round ball" in row["text_input"]
        key = re.search(r"<answer>([A-D])", row["text_output"])[1]
        assert gd.validate(row, key) is None
    plain = [json.loads(line) for line in (tmp_path / "out/train_noimage.jsonl").read_text().splitlines()]
    assert all(
        "<output_image>" not in row["text_output"] and "View 0 is." in row["text_output"] for row in plain
    )


def test_a_server_that_dies_costs_nothing_twice(server, world, monkeypatch, tmp_path):  # noqa: F811
    """The run ends in a sentence; started again, it asks only what had no accepted reply, by two workers."""
    words = (f"BASE_URL={server.url}", *FAST)
    server.dies_after, out = 12, tmp_path / "out"
    refused(lambda: generate(monkeypatch, world, out, *words, "WORKERS=1"), "failed 4 times", "start again")
    kept = [path.name for path in (out / "annotator").glob("*.json")]
    assert len(kept) == 12 == len(list((out / "annotator").iterdir())) and not (out / "meta.json").exists()
    server.dies_after, before = None, {(text, images) for text, images, _ in server.asked[:12]}
    del server.asked[:]
    generate(monkeypatch, world, out, *words, "WORKERS=2")
    whole = [path.name for path in (out / "annotator").iterdir()]
    assert len(server.asked) == len(whole) - 12 and {*kept} < {*whole} and before


def test_a_refusal_ends_the_run_at_once(server, world, monkeypatch, tmp_path):  # noqa: F811
    """A wrong key or model is not asked again: one sentence, one request for each clip already begun."""
    server.troubles = {"landmarks": [401] * 99}
    words = (f"BASE_URL={server.url}", *FAST, "WORKERS=1")
    refused(lambda: generate(monkeypatch, world, tmp_path / "out", *words), "refuses", "HTTP 401")
    assert len(server.asked) <= 14  # clips; each attempt again would be four requests


def test_a_clip_without_nameable_objects_is_skipped(server, tmp_path):
    """null in place of a name: nothing else is asked about this clip, and it is counted."""
    server.troubles = {"landmarks": [lambda text: '{"static_object": null, "dynamic_object": "a red ball"}']}
    c = constants(BASE_URL=server.url, MODEL="stub", ANNOTATOR="api", OUT=str(tmp_path))
    shot = shot_of(np.zeros((12, 20, 30, 3), np.uint8), {}, tmp_path)
    clip, reasons = gd.real_clip(c, shot, gd.open_annotator(c))
    assert "annotator names" in str(reasons) and clip.moving == []
    assert len(server.asked) == 1 and server.asked[0][1] == 10  # of twelve frames
    assert "agree: there is none\n" in server.asked[0][0]
    said = {"SceneSummary": "A yard {with} braces.", "SceneDescription": "Two dogs.", "SceneTags": ["x"]}
    (tmp_path / "caption.json").write_text(json.dumps(said | {"LLM": None}))
    gd.real_clip(c, shot, gd.open_annotator(c))
    assert "agree: A yard {with} braces. Two dogs.\n" in server.asked[1][0]


def test_frames_that_the_annotator_rejects_are_not_used(server, tmp_path):
    """Eq. 2: of four overlays the second is not confirmed, so its mask is dropped."""
    bad = ['{"valid": [0, 4]}', '{"valid": [1.0]}']  # no such overlay, no number of one
    server.troubles = {
        "check": [*(lambda text, reply=reply: reply for reply in bad), lambda text: '{"valid": [0, 2, 3]}']
    }
    c = constants(BASE_URL=server.url, MODEL="stub", ANNOTATOR="api", OUT=str(tmp_path))
    masks = np.zeros((6, 20, 30), bool)
    masks[[0, 1, 3, 5], :9] = True
    frames = np.zeros((6, 20, 30, 3), np.uint8)
    found = gd.confirm(c, frames, "red box", masks, range(6), gd.open_annotator(c))
    assert found.tolist() == [True, False, False, True, False, True]
    assert [images for _, images, _ in server.asked] == [4, 4, 4]


def request_to(server, trouble):
    """Sends one request to a server that has this trouble -> the reply, or what goes wrong."""
    server.troubles = {"thought": [trouble]}
    server.elsewhere = server.url.replace("local" + "host", "0" + ".0.0.0") + "/stolen"
    body = {"messages": [{"content": [{"text": "right answer is: A. b, exactly 1 times"}]}]}
    headers = {"Authorization": "Bearer secret"}
    request = Request(f"{server.url}/chat/completions", json.dumps(body).encode(), headers)
    return annotator.fetch(request, timeout=1.0)


def test_a_redirect_is_refused_and_the_key_goes_nowhere_else(server):
    with pytest.raises(HTTPError) as error:
        request_to(server, "redirect")
    assert error.value.code == 302 and len(server.asked) == 1


@pytest.mark.parametrize("trouble, kind", [("drip", TimeoutError), ("endless", ValueError)])
def test_a_reply_without_an_end_is_given_up_in_time(server, trouble, kind):
    begun = time.time()
    with pytest.raises(kind):
        request_to(server, trouble)
    assert time.time() - begun < 3


@pytest.mark.parametrize(
    "url",
    [
        *["api.openai.com/v1", "", "ftp://x/v1", "file:///x", "https://", "http://[::1"],
        *[
            "https://api.openai.com:99999/v1",
            "http://host:abc",
            "http://a b/v1",
            "http://h/v 1",
            "http://h\n",
        ],
    ],
)
def test_an_address_is_checked_before_any_video_is_read(url):
    refused(lambda: annotator.require_url(url), "BASE_URL=", "https://")
    for right in (
        "https://api.openai.com/v1",
        "http://host:8000/v1",
        "http://[::1]:8000/v1",
        "http://my_host",
    ):
        annotator.require_url(right)


def test_a_key_that_no_header_takes_is_refused_at_once(monkeypatch):
    """The break at the end of a file is no part of the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "abc\n")
    annotator.require_url("https://api.openai.com/v1")
    for key in ("a b", "a\nb", "\u201cabc\u201d"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert key not in refused(
            lambda: annotator.require_url("https://api.openai.com/v1"), "OPENAI_API_KEY"
        )


@pytest.mark.parametrize(
    "usage", [None, 5, [1], {}, {"total_tokens": "many"}, {"total_tokens": float("nan")}]
)
def test_an_odd_count_of_tokens_costs_no_reply(usage):
    assert annotator.count_tokens({"usage": usage}) == 0
    assert annotator.count_tokens({"usage": {"total_tokens": 7}}) == 7


@pytest.mark.parametrize("name", ["a\nB. red car", "a red </think> car", "", 5, None, "x " * 80])
def test_a_name_is_one_short_line(name):
    reply = json.dumps({"static_object": name, "dynamic_object": "small round ball"})
    assert annotator.read_names(reply) is None or name is None
