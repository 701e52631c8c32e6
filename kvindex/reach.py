"""What becomes of the connections to publishers, in words: nobody should wait for what cannot come."""

from kvevents import LinkChange

_SAID = {
    "refused": "nobody listens there yet; trying on",
    "agreed": "connected",
    "mismatched": "something else than a publisher listens there: the replay socket's port, or HTTP's?",
    "lost": "the connection ended; trying on",
}
_QUIET_S = 10.0


class Reach:
    """Says of each endpoint when its state has changed, and once when it is connected and silent."""

    def __init__(self, topic: str, now: float) -> None:
        self._topic = topic
        self._said: dict[str, str] = {}
        self._heard: set[str] = set()
        self._quiet_at = now + _QUIET_S

    def change(self, change: LinkChange) -> str:
        """Give what is to be said of a change, "" where it was said before or means nothing."""
        before = self._said.get(change.endpoint, "")
        # who ends a connection before anything was agreed on speaks something else
        event = "mismatched" if change.event == "lost" and before != _SAID["agreed"] else change.event
        text = _SAID.get(event, "")
        # who is refused or sent away again and again has nothing new to say
        if not text or text == before or (event == "refused" and before and before != _SAID["agreed"]):
            return ""
        if event == "mismatched" and before == _SAID["lost"]:
            return ""  # it is on its way down, or up
        self._said[change.endpoint] = text
        return f"{change.endpoint}: {text}"

    def heard(self, endpoint: str) -> None:
        """Hear that a message came."""
        self._heard.add(endpoint)

    def quiet(self, now: float) -> list[str]:
        """Give what is to be said, once after some seconds, of those that are connected and silent."""
        if now < self._quiet_at:
            return []
        self._quiet_at = float("inf")
        why = f"no topic begins with {self._topic!r}, or it is idle" if self._topic else "it is idle"
        return [
            f"{endpoint}: connected, and nothing came: {why}; `kvindex doctor {endpoint}` tells more"
            for endpoint, said in self._said.items()
            if said == _SAID["agreed"] and endpoint not in self._heard
        ]
