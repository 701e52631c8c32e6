"""The simulated OpenAI servers of the examples: what they cache, say, announce and take time for."""

import asyncio
import contextlib
import json
import random

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from examples import simulated_servers
from examples.simulated_servers import Engine, Speed, Words, create_app, save_tokenizer
from indexer import open_index
from kvevents import EventPool
from kvindex.fleet import Fleet
from scorer import PrefixScorer

from .conftest import MODEL, until
from .serving import serving

FAST = Speed(prefill=1e6, decode_s=0.0001, stream_interval=3)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Naïve → 你好?\n"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / MODEL
    save_tokenizer(folder)
    return folder


@contextlib.contextmanager
def served(folder, pods=1, num_blocks=400, speed=FAST):
    with Fleet(pods, model=MODEL, num_blocks=num_blocks) as fleet:
        engines = [Engine(pod, speed) for pod in fleet.pods]
        words = Words(folder)
        with serving(*[create_app(engine, words, MODEL) for engine in engines]) as urls:
            yield fleet, engines, urls


def ask(url, prompt, output=(5, 6, 7), **more):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": len(output), "simulated_output": list(output), **more}
    return httpx.post(f"{url}/v1/completions", json=body)


def events_of(answer):
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_what_is_cached_is_what_was_computed_before(folder):
    rng, known = random.Random(3), []
    with served(folder, num_blocks=4_000) as (_, _, (url,)):
        for _ in range(30):
            old = rng.choice(known) if known and rng.random() < 0.8 else []
            prompt = old[: rng.randint(0, len(old))] + rng.choices(range(50_000), k=rng.randint(1, 90))
            output = rng.choices(range(50_000), k=rng.randint(1, 40))
            usage = ask(url, prompt, output).json()["usage"]
            # of each text seen before, the whole blocks of 16 that this prompt begins with, less its last token
            same = [
                next((n for n, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), None) for text in known
            ]
            shared = [min(len(t), len(prompt) - 1) if n is None else n for t, n in zip(known, same, strict=True)]
            expected = max((min(n, len(prompt) - 1) // 16 * 16 for n in shared), default=0)
            assert usage["prompt_tokens_details"]["cached_tokens"] == expected
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(output))
            known.append(prompt + output[:-1])  # the last token was never computed


def test_the_index_knows_what_the_servers_hold_after_traffic_that_evicts_and_breaks_off(folder):
    rng = random.Random(5)
    systems = [rng.choices(range(50_000), k=160) for _ in range(6)]
    prompts = [rng.choice(systems) + rng.choices(range(50_000), k=rng.randint(1, 120)) for _ in range(60)]

    async def traffic(urls):
        async def one(number, prompt):
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 30, "stream": True}
            async with client.stream("POST", f"{urls[number % 2]}/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    if number % 3 == 0:
                        return  # the client goes away

        async with httpx.AsyncClient() as client:
            await asyncio.gather(*[one(number, prompt) for number, prompt in enumerate(prompts)])

    index = open_index("memory://")
    with served(folder, 2, num_blocks=90) as (fleet, engines, urls), EventPool(index) as pool:
        for pod in fleet.pods:
            pool.subscribe(pod.name, pod.publisher.endpoint, replay=pod.publisher.replay, model=MODEL)
            pod.publisher.wait_for_subscribers(1)
        asyncio.run(traffic(urls))
        until(lambda: not any(engine.running or engine.waiting for engine in engines))
        published = {pod.name: pod.publisher.last_seq for pod in fleet.pods}
        until(lambda: {source.pod: seq for source, seq in pool.sequences().items()} == published)
        pool.drain()
        scorer = PrefixScorer(index)
        for prompt in prompts:
            held = {match.pod: match.blocks for match in scorer.match(prompt, model=MODEL)}
            assert held == {pod.name: pod.engine.hit_blocks(prompt) for pod in fleet.pods}
        # the caches were too small for all of it, and something is left
        assert any(match.tokens for match in scorer.match(prompts[-1], model=MODEL))
        assert max(sum(pod.engine.resident().values()) for pod in fleet.pods) <= 90
        assert index.stats()["removed_unknown_total"] == 0
        assert [httpx.post(f"{url}/reset_prefix_cache").json() for url in urls] == [{"emptied": True}] * 2
        until(lambda: all(status.blocks == 0 for status in index.sources()))
    index.close()


def test_prompts_are_computed_one_at_a_time_less_what_is_cached(folder, monkeypatch):
    computed, computing = [], 0

    async def sleep(seconds):
        nonlocal computing
        computing += 1
        assert computing == 1
        await real_sleep(0.001)
        computing -= 1
        computed.append(round(seconds * 1_000))

    real_sleep = asyncio.sleep
    with Fleet(1, model=MODEL) as fleet:
        engine = Engine(fleet.pods[0], Speed(prefill=1_000))

        async def run():
            monkeypatch.setattr(simulated_servers.asyncio, "sleep", sleep)
            prompts = [list(range(100)), list(range(50)), list(range(200))]
            requests = await asyncio.gather(*[engine.begin(prompt, None) for prompt in prompts])
            for request in requests:
                engine.finish(request, ())

        asyncio.run(run())
    assert computed == [100, 50 - 48, 200 - 96]


def test_events_go_out_when_their_prompt_is_computed(folder):
    with Fleet(1, model=MODEL) as fleet:
        engine, publisher = Engine(fleet.pods[0], Speed(prefill=1_000)), fleet.pods[0].publisher

        async def run():
            first = await engine.begin(list(range(32)), None)
            assert publisher.last_seq == 0
            second = asyncio.create_task(engine.begin(list(range(500, 600)), None))
            while engine.running != 2:
                await asyncio.sleep(0)
            engine.finish(first, list(range(40)))
            assert publisher.last_seq == 0  # older events of the second are not out yet
            engine.finish(await second, ())
            assert publisher.last_seq == 1

        asyncio.run(run())


def test_a_prompt_waits_until_there_are_blocks(folder):
    with Fleet(1, model=MODEL, num_blocks=10) as fleet:
        engine = Engine(fleet.pods[0], FAST)

        async def run():
            first = await engine.begin(list(range(150)), None)
            second = asyncio.create_task(engine.begin(list(range(500, 600)), None))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not second.done()
            engine.finish(first, ())
            engine.finish(await second, ())

        asyncio.run(run())


def test_a_prompt_that_is_given_up_leaves_nothing_in_use(folder):
    with served(folder, speed=Speed(prefill=1)) as (fleet, (engine,), (url,)):
        body = {"model": MODEL, "prompt": list(range(80)), "stream": True}
        timeout = httpx.Timeout(5, read=0.2)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout) as computed:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=timeout) as waiting:
                until(lambda: (engine.running, engine.waiting) == (1, 2))
                with pytest.raises(httpx.ReadTimeout):
                    next(waiting.iter_raw())
            until(lambda: (engine.running, engine.waiting) == (1, 1))
            with pytest.raises(httpx.ReadTimeout):
                next(computed.iter_raw())
        until(lambda: not engine.running and not engine.waiting)
        assert fleet.pods[0].publisher.last_seq == 0
        assert httpx.post(f"{url}/reset_prefix_cache").json() == {"emptied": True}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_says_what_the_whole_answer_says(folder, path):
    what = {"messages": MESSAGES} if "chat" in path else {"prompt": "It said: ünïcode?"}
    body = {"model": MODEL, "max_tokens": 20, **what}
    with served(folder) as (_, _, (url,)):
        whole = httpx.post(f"{url}/v1/{path}", json=body).json()
        pieces = events_of(httpx.post(f"{url}/v1/{path}", json={**body, "stream": True}))
        counted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        *again, last = events_of(httpx.post(f"{url}/v1/{path}", json=counted))
    (choice,) = whole["choices"]
    said = choice["message"]["content"] if "chat" in path else choice["text"]
    for stream in (pieces, again):
        choices = [piece["choices"][0] for piece in stream]
        texts = [choice["delta"]["content"] if "chat" in path else choice["text"] for choice in choices]
        assert "".join(texts) == said
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(said) == 20
    assert last["choices"] == []
    prompt = whole["usage"]["prompt_tokens"]
    assert last["usage"] == {**whole["usage"], "prompt_tokens_details": {"cached_tokens": (prompt - 1) // 16 * 16}}


def test_text_and_chat_become_the_tokens_that_transformers_makes(folder):
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), Words(folder)
    for text in ["", "plain", "Naïve → 你好\x00\n\n  x", "<|im_start|>user"]:
        assert ours.tokens_of(text) == theirs(text)["input_ids"]
        assert ours.text_of(ours.tokens_of(text)) == text
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ours.tokens_of_chat(MESSAGES) == expected


def test_the_next_turn_of_a_chat_finds_the_last_one(folder):
    with served(folder) as (_, _, (url,)):
        body = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 64}
        first = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        said = first["choices"][0]["message"]
        body["messages"] = [*MESSAGES, said, {"role": "user", "content": "Go on."}]
        usage = httpx.post(f"{url}/v1/chat/completions", json=body).json()["usage"]
    known = first["usage"]["prompt_tokens"] + 63
    assert usage["prompt_tokens_details"]["cached_tokens"] == known // 16 * 16


def test_what_cannot_run_is_refused(folder):
    with served(folder, num_blocks=10, speed=Speed(max_waiting=0)) as (_, _, (url,)):
        assert ask(url, [1]).status_code == 503
    with served(folder, num_blocks=10) as (_, _, (url,)):
        assert ask(url, []).status_code == 400
        assert ask(url, list(range(161))).status_code == 400
        assert ask(url, [1], model="another").status_code == 404
        assert ask(url, {}).status_code == 400
        assert ask(url, [-1]).status_code == 400
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
        assert httpx.get(f"{url}/health").json() == {"waiting": 0, "running": 0}
        assert ask(url, [1]).status_code == 200
