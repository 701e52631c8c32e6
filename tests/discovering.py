"""Pods to discover, and a follower of them."""

import contextlib

from kvevents.discovery import Endpoint, Follower, Found

MODEL = "m"


def pod(name, *endpoints, **more):
    return Found(name=name, endpoints=tuple(Endpoint(one, model=MODEL) for one in endpoints), **more)


@contextlib.contextmanager
def following(target, *sources, **more):
    follower = Follower(target, sources, retry_s=0.001, retry_max_s=0.01, **more)
    follower.start()
    try:
        yield follower
    finally:
        follower.close()
