"""Where an index in Redis is, and what else is there."""

import pytest

from indexer import AsyncRedisReader, IndexUnavailable, InvalidQuestion, Prompt, RedisIndex, Source, open_index

from .conftest import MODEL, NEEDS_REDIS, POD, blocks_in, stored
from .redis_fleet import FLEET, Fleet, begun, tokens_of
from .redis_server import RedisServer, somewhere

pytestmark = NEEDS_REDIS


def test_only_keys_with_the_prefix_are_touched(own_server):
    foreign = {b"somebody": b"else", b"b12345678": b"1", b"kvindex": b"2"}
    own_server.client.mset(foreign)
    own_server.client.config_resetstat()
    fleet = Fleet(own_server.url + "?prefix=mine:", builders=2)
    for _ in range(5):
        fleet.live(30)
        fleet.agree()
        for builder in fleet.builders:
            builder.expire()
    for source in FLEET:
        for index in (fleet.memory, *fleet.builders):
            index.forget(source.pod)
    for builder in fleet.builders:
        builder.expire()
        builder.close()
        builder.close()
    sent = {name.removeprefix("cmdstat_") for name in own_server.client.info("commandstats")}
    assert sent & {"eval", "mget"}
    assert not [name for name in sent if name.startswith(("keys", "scan", "flush", "hscan", "swapdb", "debug"))]
    left = own_server.client.keys("*")
    assert {name: own_server.client.get(name) for name in left if not name.startswith(b"mine:")} == foreign


def test_two_prefixes_do_not_meet(redis_place):
    indexes = [begun(somewhere(redis_place), [POD]) for _ in range(2)]
    indexes[0].apply(POD, [stored([1], range(4))])
    indexes[1].register(Source("b"), model=MODEL)
    assert tokens_of(indexes[0], range(4)) == {POD.pod: 4}
    assert tokens_of(indexes[1], range(4)) == {POD.pod: 0, "b": 0}
    indexes[1].forget(POD.pod)
    assert (blocks_in(indexes[0]), blocks_in(indexes[1])) == (1, 0)


def test_records_of_somebody_else_are_passed_over(redis_url):
    index = begun(redis_url, [POD])
    index.apply(POD, [stored([1], range(4))])
    run, layout = index._store.run, index._layout
    for field, value in {"0 x": b"\xc1", "": b"", "1 y": b"\x91\x01", "z": b'{"pod": "z"}'}.items():
        run([("HSET", layout.of(MODEL).directory, field, value)])
    run([("INCR", layout.of(MODEL).version)])
    run([("HSET", layout.models, layout.of("else").tag, b"\xff\xfe")])
    run([("HSET", layout.of("else").directory, "0 x", b"?")])
    for one in (index, RedisIndex(redis_url), begun(redis_url, [POD, Source("x")])):
        assert tokens_of(one, range(4))[POD.pod] == 4
        assert str(one.sources()[0].source) == POD.pod
        one.expire()


@pytest.mark.parametrize("scheme", ["redis", "valkey", "unix"])
def test_urls_with_a_password(tmp_path, scheme):
    path = tmp_path / "s"  # short: the path of a socket is bounded
    server = RedisServer(tmp_path, "--unixsocket", str(path))
    try:
        server.client.config_set("requirepass", "pass:word")
        place = str(path) if scheme == "unix" else f"127.0.0.1:{server.port}"
        last = "?db=3" if scheme == "unix" else "/3"
        index = open_index(f"{scheme}://default:pass%3Aword@{place}{last}")
        index.register(POD, model=MODEL)
        index.apply(POD, [stored([1], range(4))])
        assert tokens_of(index, range(4)) == {POD.pod: 4}
        assert place in repr(index)
        assert not [secret for secret in ("pass:", "pass%", "word,", "word@") if secret in repr(index)]
        assert list(server.client.info("keyspace")) == ["db3"]
        if scheme == "unix":  # nobody has to say who he is
            server.client.config_set("requirepass", "")
            assert tokens_of(open_index(f"unix://{path}{last}"), range(4)) == {POD.pod: 4}
            server.client.config_set("requirepass", "pass:word")
        wrong = open_index(f"{scheme}://:secret@{place}{last}")
        with pytest.raises(IndexUnavailable) as refused:
            wrong.match(Prompt(range(4), MODEL))
        assert "secret" not in repr(refused.value)
        assert place in str(refused.value)
        wrong.register(POD, model=MODEL)
        wrong.apply(POD, [stored([1], range(4))])
        wrong.close()
    finally:
        server.kill()


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis://:secret@", "redis://:secret@/0", "redis://u:secret@:6379/0", "redis://:secret@host:port/0",
     "redis://:secret@host:99999/0", "redis://:sec/secret@host/0", "redis://:secret@[::1/0", "redis://:secret@host?size=3",
     "redis://:secret@host?timeout=x", "redis://:secret@host?timeout=0", "redis://:secret@host?timeout=-1",
     "redis://:secret@host?timeout=nan", "redis://:secret@host?timeout=inf", "redis://:secret@host?db=x",
     "unix://:secret@/tmp/s?db=x", "rediss://:secret@host?ssl_cert_reqs=none", "redis+sentinel://:secret@host"],
)  # fmt: skip
@pytest.mark.parametrize("opened", [open_index, RedisIndex, AsyncRedisReader])
def test_bad_urls_are_refused_without_a_word_of_the_password(url, opened):
    with pytest.raises(InvalidQuestion, match="index URL") as refused:
        opened(url)
    assert "secret" not in str(refused.value)
