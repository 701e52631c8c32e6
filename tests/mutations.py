"""Payloads that are nearly right."""

from random import Random

import msgspec

from .payloads import ODD, golden_payloads, made_payloads, pack


def spans_of(body: bytes) -> list[tuple[int, int]]:
    """Where each value begins and ends."""
    spans: list[tuple[int, int]] = []

    def walk(at: int) -> int:
        place = len(spans)
        spans.append((at, at))
        tag, end, items = body[at], at + 1, 0

        def number(width: int) -> int:
            return int.from_bytes(body[at + 1 : at + 1 + width])

        if 0x80 <= tag <= 0x8F:
            items = 2 * (tag & 15)
        elif 0x90 <= tag <= 0x9F:
            items = tag & 15
        elif 0xA0 <= tag <= 0xBF:
            end += tag & 31
        elif 0xC4 <= tag <= 0xC6 or 0xD9 <= tag <= 0xDB:
            width = 1 << (tag - (0xC4 if tag <= 0xC6 else 0xD9))
            end += width + number(width)
        elif tag in {0xCA, 0xCB}:
            end += 4 << (tag - 0xCA)
        elif 0xCC <= tag <= 0xD3:
            end += 1 << (tag - 0xCC) % 4
        elif 0xDC <= tag <= 0xDF:
            width = 2 << (tag - 0xDC) % 2
            items = number(width) * (2 if tag >= 0xDE else 1)
            end += width
        for _ in range(items):
            end = walk(end)
        spans[place] = (at, end)
        return end

    assert walk(0) == len(body)
    return spans


class Mutator:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.odd = [pack(item) for item in ODD]
        captures = [body for body in golden_payloads() if len(body) < 1200][::7]
        made = made_payloads()
        self.corpus = [(body, self.some(spans_of(body))) for body in captures + made * (len(captures) // len(made))]

    def some(self, spans):
        """Spans without most of those in long lists, which would be nearly all."""
        few = [span for span in spans if span[1] - span[0] > 3]
        return few + self.random.sample(spans, min(len(spans), 30))

    def payload(self) -> bytes:
        random = self.random
        body, spans = random.choice(self.corpus)
        choice = random.random()
        if choice < 0.75:
            body = self.replace(body, spans)
        if choice > 0.65:
            for _ in range(random.randrange(1, 4)):
                body = self.garble(body)
        return body

    def replace(self, body, spans):
        """Other values in the places of some: nearly always still msgpack."""
        random = self.random
        done = len(body)
        for start, end in sorted({random.choice(spans) for _ in range(random.randrange(1, 4))}, reverse=True):
            if end > done:
                continue
            done = start
            old = body[start:end]
            match random.randrange(10):
                case 0:
                    new = b"\x91" + old
                case 1:
                    new = pack(old)
                case 2 | 3:
                    other, places = random.choice(self.corpus)
                    first, last = random.choice(places)
                    new = other[first:last]
                case 4:
                    first, last = random.choice(spans)
                    new = body[first:last] if last <= start else old
                case 5:
                    new = self.rewritten(old)
                case _:
                    new = random.choice(self.odd)
            body = body[:start] + new + body[end:]
        return body

    def rewritten(self, body):
        """The same value in another form."""
        try:
            return pack(msgspec.msgpack.decode(body), self.random)
        except (msgspec.DecodeError, TypeError):
            return body

    def garble(self, body):
        random = self.random
        at = random.randrange(len(body) + 1)
        to = at + random.randrange(12)
        match random.randrange(9):
            case 0:
                return body[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in body[at : at + 1]) + body[at + 1 :]
            case 1:
                return body[:at] + bytes([random.randrange(0x80, 0xE0)]) + body[at + 1 :]
            case 2:
                return body[:at]
            case 3:
                return body[:at] + random.randbytes(random.randrange(1, 5)) + body[at:]
            case 4:
                return body[:at] + body[to:]
            case 5:
                return body[:to] + body[at:]
            case 6:
                other, _ = random.choice(self.corpus)
                return body[:at] + other[random.randrange(len(other)) :]
            case 7:
                return body[:at] + random.choice(self.odd) + body[at:]
            case _:
                return self.lie(body)

    def lie(self, body):
        """A list, map or text says that it is longer or shorter than it is."""
        random = self.random
        heads = [
            at for at, byte in enumerate(body) if 0x80 <= byte < 0xC0 or 0xC4 <= byte < 0xCA or 0xD9 <= byte < 0xE0
        ]
        if not heads:
            return body
        at = random.choice(heads)
        if body[at] >= 0xC0:
            wrong = at + random.randrange(1, 5)
            return body[:wrong] + random.randbytes(1) + body[wrong + 1 :]
        if random.randrange(2):
            return body[:at] + bytes([body[at] ^ random.randrange(1, 16)]) + body[at + 1 :]
        wide = 0xDF if body[at] < 0x90 else 0xDD if body[at] < 0xA0 else 0xDB
        length = random.choice([0, len(body) // 2, len(body), 1 << 16, 1 << 31, (1 << 32) - 1])
        return body[:at] + bytes([wide]) + length.to_bytes(4) + body[at + 1 :]
