"""Requests to an OpenAI-compatible endpoint, by the standard library alone."""

import json
import os
import sys
import time
from urllib.request import Request, urlopen

from model import check


def post(base_url, body, waits, timeout, spent):
    """Sends a request, again and later while it fails -> the reply's text; exits in the end.

    Its requests and tokens are added to `spent`. The key, OPENAI_API_KEY, goes nowhere but into the header.
    """
    key = os.getenv("OPENAI_API_KEY", "")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"{base_url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    for wait in waits:
        time.sleep(wait)
        try:
            with urlopen(request, timeout=timeout) as answer:
                reply = json.load(answer)
            spent.update(requests=1, tokens=(reply.get("usage") or {}).get("total_tokens", 0))
            return str(reply["choices"][0]["message"]["content"])
        except Exception as error:  # of the network, of HTTP or of the reply's form
            trouble, code = type(error).__name__, getattr(error, "code", 500)
            check(code in (408, 429) or code >= 500, f"BASE_URL={base_url} refuses the request: HTTP {code}.")
    sys.exit(f"BASE_URL={base_url} failed {len(waits)} times ({trouble}); nothing paid is lost, start again.")
