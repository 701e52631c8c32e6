"""Text and messages from a client through the router, the scorer and simulated servers, all with one tokenizer."""

import httpx

from examples.demo import MODEL, stack

from .conftest import until


def answers(url):
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def observed(scorer):
    """How many requests the scorer was told of that it could make sense of."""
    lines = httpx.get(f"{scorer}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("kvindex_observations_total{") and "unknown_pod" not in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def held(scorer, body):
    """The most that a pod holds of a prompt."""
    answer = httpx.post(f"{scorer}/v1/score", json=body).raise_for_status().json()
    return max(match["tokens"] for match in answer["matches"])


def test_text_and_chat_go_where_they_are_cached():
    system = {"role": "system", "content": "You know where each block of the cache lies. " * 8}
    with stack([]) as (router, scorer, _), httpx.Client(base_url=router) as client:
        for url in (f"{router}/health", f"{scorer}/readyz"):
            until(lambda url=url: answers(url))
        body = {"model": MODEL, "max_tokens": 24}
        body["messages"] = [system, {"role": "user", "content": "Wo liegt der nächste? 在哪里"}]
        placed, known = [], 0
        for turn in range(4):
            # a token is a byte; all of the last turn is there but the last token of its answer
            until(lambda expected=known // 16 * 16: held(scorer, body) == expected)
            answer = client.post("/v1/chat/completions", json=body).raise_for_status()
            placed.append(answer.headers["x-routed-to"])
            usage = answer.json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == known // 16 * 16
            known = usage["prompt_tokens"] + 23
            body["messages"] += [answer.json()["choices"][0]["message"], {"role": "user", "content": f"And {turn}?"}]
        assert len(set(placed)) == 1
        until(lambda: observed(scorer) == 4)
        text = {"model": MODEL, "prompt": "Once upon a time " * 10, "max_tokens": 2}
        first = client.post("/v1/completions", json=text)
        until(lambda: held(scorer, text) == 160)
        again = client.post("/v1/completions", json=text)
        assert again.headers["x-routed-to"] == first.headers["x-routed-to"]
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 160
