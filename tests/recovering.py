"""A simulated engine that is followed, for tests of recovery: what it says is lost, late, and asked for again."""

from collections import deque

import pytest

from kvevents.actions import Ask, Begin, Deliver, Doubt, Whole
from kvevents.message import Message
from kvevents.recovery import Recovery
from kvevents.stream import Stream, Verdict

CONNECTED = "connected"
END = "end"


def said(life, seq, what=""):
    """A message: its payload says of which life of the engine it is."""
    return Message(b"kv@pod-a@m", seq, f"{life}:{seq:02}:{what}".encode())


def told(actions):
    """What actions say, in short."""
    texts = []
    for action in actions:
        match action:
            case Deliver(messages):
                texts.append(" ".join(["deliver", *(str(message.seq) for message in messages)]))
            case Ask(_, start):
                texts.append(f"ask {start}")
            case _:
                texts.append(type(action).__name__.lower())
    return texts


class Engine:
    """A publisher and the ring of its last messages."""

    def __init__(self, ring):
        self.ring = deque(maxlen=ring)
        self.lives = [[]]

    @property
    def published(self):
        """All that was published in this life."""
        return self.lives[-1]

    def publish(self, what=""):
        message = said(len(self.lives) - 1, len(self.published), what)
        self.published.append(message)
        self.ring.append(message)
        return message

    def restart(self):
        self.ring.clear()
        self.lives.append([])

    def replay(self, start):
        return [message for message in self.ring if message.seq >= start]

    def cache(self):
        """What it takes to know its cache: the messages from the last clear on."""
        return since_clear(self.published)

    @property
    def has_all(self):
        return len(self.ring) == len(self.published)


def since_clear(messages):
    clears = [at for at, message in enumerate(messages) if message.payload.endswith(b"clear")]
    return messages[clears[-1] :] if clears else messages


class Consumer:
    """Applies what it is told to, and judges the numbers as `kvevents.apply` does."""

    def __init__(self):
        self.stream = Stream()
        self.applied = []
        self.is_exact = False
        self.has_cleared = False
        """The last thing of note was a clear."""

    def take(self, actions):
        for action in actions:
            if isinstance(action, Begin):
                self.stream, self.applied, self.is_exact, self.has_cleared = Stream(), [], False, False
            elif isinstance(action, Deliver):
                self.apply(action.messages)
            elif isinstance(action, Doubt):
                self.is_exact = False
            elif isinstance(action, Whole):
                self.is_exact = True

    def apply(self, messages):
        assert messages
        for message in messages:
            assert message not in self.applied
            assert self.stream.last is None or message.seq > self.stream.last
            verdict = self.stream.observe(message.seq)
            if verdict in (Verdict.GAP, Verdict.LATE):
                self.is_exact = self.has_cleared = False
            elif verdict is Verdict.FIRST:
                self.is_exact = True
            self.applied.append(message)
            if message.payload.endswith(b"clear"):
                self.is_exact = self.has_cleared = True


class World:
    """An engine, what is on its way from it, `Recovery` and a consumer."""

    def __init__(self, ring=100, *, replays=True):
        self.engine = Engine(ring)
        self.recovery = Recovery()
        self.consumer = Consumer()
        self.replays = replays
        self.now = 1000.0
        self.live = deque()
        self.request = None
        self.is_answered = False
        self.reply = deque()
        self.asked = []
        self.saved = None

    def do(self, actions, most=1):
        """Take actions; `most` is how often an event may ask."""
        asks = [action for action in actions if isinstance(action, Ask)]
        assert len(asks) <= most
        assert len({ask.replay for ask in self.asked + asks}) == len(self.asked + asks)
        for ask in asks:
            self.asked.append(ask)
            self.request, self.is_answered, self.reply = ask, False, deque()
        assert self.recovery.is_active == (self.request is not None)
        self.consumer.take(actions)
        if self.consumer.has_cleared:
            self.consumer.has_cleared = False
            self.recovery.emptied()

    # ---- the engine and the network

    def publish(self, count=1, *, lost=False, what=""):
        for _ in range(count):
            message = self.engine.publish(what)
            if not lost:
                self.live.append(message)

    def restart(self, lost=0, *, noted=True):
        """Restart in place; the first messages have no listener yet."""
        self.engine.restart()
        self.publish(lost, lost=True)
        if noted:
            self.live.append(CONNECTED)

    def answer(self, *, start=None, lost=(), ends=True):
        """Let the engine answer: what it has now is on its way."""
        if self.request is not None and self.replays and not self.is_answered:
            self.is_answered = True
            messages = self.engine.replay(self.request.start if start is None else start)
            self.reply.extend(message for at, message in enumerate(messages) if at not in lost)
            if ends:
                self.reply.append(END)

    # ---- the machine

    def connect(self):
        self.live.append(CONNECTED)
        self.hear()

    def hear(self, count=None):
        """Feed live messages to the machine, up to the next note of a connection together."""
        left = len(self.live) if count is None else count
        while self.live and left > 0:
            if self.live[0] == CONNECTED:
                self.live.popleft()
                self.do(self.recovery.connected(self.now))
                left -= 1
                continue
            batch = []
            while self.live and self.live[0] != CONNECTED and left > 0:
                batch.append(self.live.popleft())
                left -= 1
            if self.recovery.goes_on(batch, self.now):
                self.do([Deliver(batch)])
            else:
                self.do(self.recovery.live(batch, self.now), most=len(batch))

    def read(self, count=None):
        """Feed replies to the machine."""
        left = len(self.reply) if count is None else count
        while self.reply and left > 0:
            if self.reply[0] == END:
                self.reply.popleft()
                ended, self.request = self.request, None
                self.do(self.recovery.ended(ended.replay, self.now), most=2)
                return
            batch = []
            while self.reply and self.reply[0] != END and left > 0:
                batch.append(self.reply.popleft())
                left -= 1
            self.do(self.recovery.replayed(self.request.replay, batch, self.now))

    def fail(self):
        if self.request is not None:
            failed, self.request, self.reply = self.request, None, deque()
            self.do(self.recovery.failed(failed.replay, self.now))

    def spoil(self):
        """Lose the last message that was delivered on the way into the index."""
        if self.consumer.applied:
            self.consumer.applied.pop()
            self.consumer.is_exact = False
            self.recovery.spoiled(self.now)

    def save(self):
        """Keep what another process can go on from."""
        self.saved = (
            self.recovery.position,
            self.consumer.stream.last,
            list(self.consumer.applied),
            self.consumer.is_exact,
        )

    def move(self):
        """Go on in another process: what came since is not known there."""
        if self.saved is not None:
            position, last, applied, is_exact = self.saved
            self.recovery, self.consumer = Recovery(position=position), Consumer()
            self.consumer.stream.last, self.consumer.applied, self.consumer.is_exact = last, list(applied), is_exact
            self.request, self.reply, self.asked = None, deque(), []
            self.live = deque([CONNECTED])

    def tick(self, seconds=1.0):
        self.now += seconds
        before = self.request
        actions = self.recovery.tick(self.now)
        if before is not None and not self.recovery.is_active:
            self.request, self.reply = None, deque()
        self.do(actions)

    def serve(self):
        """Let everything that is asked for be answered, without time passing."""
        for _ in range(12):
            self.answer()
            if not self.reply:
                return
            self.read()
        pytest.fail("it asks and asks")

    def settle(self, seconds=200.0, step=5.0):
        """Let nothing more be lost, and time pass."""
        passed = 0.0
        while passed < seconds:
            self.hear()
            self.serve()
            self.tick(step)
            passed += step
        self.serve()

    def check(self):
        if self.consumer.is_exact:
            assert since_clear(self.consumer.applied) == self.engine.cache()

    def check_exact(self):
        assert self.consumer.is_exact
        self.check()


def following(count, **more):
    """A world in which so many messages were heard and are known to be all."""
    world = World(**more)
    world.connect()
    world.serve()
    for _ in range(count):
        world.publish()
        world.hear()
        world.serve()
    world.check_exact()
    world.asked.clear()
    return world


def run(*seqs, life=0):
    return [said(life, seq) for seq in seqs]


def late(ring=4):
    """A world in which the ring did not reach back to the first message."""
    world = World(ring)
    world.publish(8, lost=True)
    world.connect()
    world.serve()
    return world


def moved(world):
    """The same world in another process."""
    world.save()
    world.publish(2)
    world.hear()
    world.move()
    return world
