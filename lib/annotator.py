"""ANNOTATOR="api": a large model behind an OpenAI-compatible endpoint names, checks and writes."""

import base64
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image

from lib.command_line import quote, require
from lib.files import evenly_spaced, read_json, write_text
from lib.jobs import add_timing, timings
from lib.spatialvid import is_object_name

PROMPTS = Path(__file__).parent.parent / "assets"
LARGEST_REPLY = 2**24  # bytes


@dataclass
class Annotator:
    """The endpoint, and where its replies are kept so that nothing is paid for twice."""

    folder: Path  # one file for each accepted reply
    base_url: str
    model: str
    asks: int  # replies to one question before it is given up
    waits: tuple  # seconds before each attempt at a busy, broken or silent server
    timeout: float  # seconds that one request may take, reply included
    most_images: int = 10  # of one question (release)

    def name_objects(self, frames, caption):
        """Names of a static and a moving object as in objects.json; {} if one is missing."""
        prompt = fill_prompt("landmarks", caption=caption)
        images = evenly_spaced(frames, self.most_images)
        names = self.ask(prompt, images, read_names)
        if not names or None in names.values():
            return {}
        return names

    def confirm(self, thing, overlays):
        """Which of the overlays show just the thing -> their numbers, by Eq. 2."""
        count = len(overlays)
        prompt = fill_prompt("check", thing=thing, count=count)
        found = self.ask(prompt, overlays, lambda reply: read_valid_numbers(reply, count))
        return found["valid"] if found else []

    def write_reasoning(self, overlays, accept, **fields):
        """A chain of thought about the overlays -> what accept(text) makes of it, or None.

        fields: question, answer, thing, and the times of the overlays as text.
        """
        prompt = fill_prompt("thought", count=len(overlays), **fields)
        return self.ask(prompt, overlays, accept)

    def ask(self, prompt, images, accept):
        """Asks about images (H, W, 3) uint8 -> what accept(reply) makes of it; None after `asks` bad ones.

        The outcome is a file, named by the digest of the request, before it is used.
        """
        content = [{"type": "text", "text": prompt}]
        for image in images:
            content.append({"type": "image_url", "image_url": {"url": jpeg_url(image)}})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        path = Path(self.folder, f"{digest}.json")
        if not path.exists():
            outcome = None
            for _ in range(self.asks):
                outcome = accept(self.post(body))
                if outcome is not None:
                    break
            write_text(path, json.dumps(outcome))
        return read_json(path)

    def post(self, body):
        """Sends a request, again and later while it fails -> the reply's text; exits in the end.

        The key, OPENAI_API_KEY, goes nowhere but into the header.
        """
        begun = time.time()
        key = os.getenv("OPENAI_API_KEY", "").strip()  # a file's line break is no part of it
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = Request(url, json.dumps(body).encode(), headers)
        for wait in self.waits:
            time.sleep(wait)
            try:
                reply = json.loads(fetch(request, self.timeout))
                text = str(reply["choices"][0]["message"]["content"])
                timings.update(requests=1, tokens=count_tokens(reply))
                add_timing("requests", 0, begun)  # the request is counted above, whatever its reply holds
                return text
            except Exception as error:  # of the network, of HTTP or of the reply's form
                trouble = type(error).__name__
                code = getattr(error, "code", 500)
                may_pass = code in (408, 429) or code >= 500
                require(may_pass, f"BASE_URL={quote(self.base_url)} refuses the request: HTTP {code}.")
        failed = f"BASE_URL={quote(self.base_url)} failed {len(self.waits)} times ({trouble})"
        sys.exit(f"{failed}; nothing that was paid for is lost, start again.")


def count_tokens(reply):
    """The tokens that a reply says it took; 0 where it does not, for a reply that was paid for is used."""
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else 0
    return total if type(total) is int else 0


def require_url(url):
    """Ends the program unless BASE_URL is a web address, and the key one that can be sent."""
    try:
        parts = urlsplit(url)
        is_host = re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?|[\da-f:.]+", parts.hostname or "")
        # reading the port checks it
        is_address = parts.scheme in ("http", "https") and is_host and parts.port != 0
        is_address = is_address and re.fullmatch("[!-~]*", url)
    except ValueError:
        is_address = False
    advice = "it is an address such as https://api.openai.com/v1"
    require(is_address, f"BASE_URL={quote(url)} does not begin with https:// and a host; {advice}.")
    key = os.getenv("OPENAI_API_KEY", "").strip()
    is_printable = re.fullmatch("[!-~]*", key)
    require(is_printable, "OPENAI_API_KEY holds signs that no key has; set it again, without spaces.")


class RefuseRedirects(HTTPRedirectHandler):
    """A redirect ends the request: urllib would send the key on, to whatever host it names."""

    def redirect_request(self, request, file, code, message, headers, url):
        """No request follows, so that the redirect itself is the error."""
        return None


def fetch(request, timeout):
    """Sends a request -> the body of the reply, within `timeout` seconds as a whole; raises what goes wrong.

    The socket's own limit starts anew with each byte, so a reply that drips would never end: a thread reads
    it, and is left behind when the time is over. TimeoutError then; ValueError where the reply is too large.
    """
    outcome = {}

    def read():
        try:
            with build_opener(RefuseRedirects).open(request, timeout=timeout) as response:
                outcome["body"] = response.read(LARGEST_REPLY + 1)
        except Exception as error:  # raised again below, in the thread that waits
            outcome["error"] = error

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout)
    if "error" in outcome:
        raise outcome["error"]
    if "body" not in outcome:
        raise TimeoutError(f"no whole reply in {timeout} s")
    if len(outcome["body"]) > LARGEST_REPLY:
        raise ValueError(f"a reply of more than {LARGEST_REPLY} bytes")
    return outcome["body"]


def fill_prompt(name, **fields):
    """assets/ask_<name>.txt with its {fields} filled in."""
    text = (PROMPTS / f"ask_{name}.txt").read_text(encoding="utf-8")
    return text.format(**fields)


def jpeg_url(image):
    """An image (H, W, 3) uint8 as the URL of a JPEG file that holds it."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def read_object(reply, is_valid):
    """The JSON object in a reply if is_valid(it), else None."""
    try:
        found = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])
        return found if is_valid(found) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def read_names(reply):
    """A reply -> {"static_object": name, "dynamic_object": name}; None unless valid.

    Names are different and have 3 to 8 words each, or one is null: there is no such object.
    """

    def is_valid(found):
        names = found["static_object"], found["dynamic_object"]
        if None in names:
            return True
        are_names = all(is_object_name(name) and 3 <= len(name.split()) <= 8 for name in names)
        return are_names and names[0] != names[1]

    return read_object(reply, is_valid)


def read_valid_numbers(reply, count):
    """A reply -> {"valid": [numbers below count]}; None unless valid."""

    def is_valid(found):
        return all(type(number) is int and 0 <= number < count for number in found["valid"])

    return read_object(reply, is_valid)
