"""A router in one file with the index in its own process: token ids in, the pod's stream out; run it with

PODS='{"vllm-0": ["http://10.0.0.7:8000", "tcp://10.0.0.7:5557"]}' uvicorn examples.fastapi_router:app
"""

import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from indexer import open_index
from kvevents import EventPool
from scorer import PrefixScorer

PODS: dict[str, list[str]] = json.loads(os.environ["PODS"])  # where each serves, and where it publishes KV events
BUSY = 8.0  # what a request in flight counts for, in blocks
index = open_index("memory://")
scorer = PrefixScorer(index)
in_flight: Counter[str] = Counter()


@asynccontextmanager
async def follow(app: FastAPI) -> AsyncIterator[None]:
    """Follow all pods."""
    with EventPool(index) as pool:
        for name, (_, events) in PODS.items():
            pool.subscribe(name, events)
        async with httpx.AsyncClient(timeout=600) as app.state.client:
            yield


app = FastAPI(lifespan=follow)


@app.post("/v1/completions")
async def completions(body: dict[str, Any]) -> StreamingResponse:
    """Send a request to the pod that holds most of its prompt, less what is in flight there."""
    if not isinstance(body.get("prompt"), list):
        raise HTTPException(422, "prompt: expected token ids")
    scores = await scorer.ascore(body["prompt"], model=body.get("model", ""))
    pod = max(PODS, key=lambda name: scores.get(name, 0.0) - BUSY * in_flight[name])
    request = app.state.client.build_request("POST", f"{PODS[pod][0]}/v1/completions", json=body)
    answer = await app.state.client.send(request, stream=True)

    async def relay() -> AsyncIterator[bytes]:
        in_flight[pod] += 1
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            in_flight[pod] -= 1
            await answer.aclose()

    return StreamingResponse(relay(), answer.status_code, {"x-routed-to": pod}, answer.headers.get("content-type"))
