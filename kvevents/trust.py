"""What the answers about a source are worth, and why: said to the index whenever it changes."""

from collections.abc import Callable
from contextlib import suppress
from itertools import chain

from indexer import UNREACHABLE, Index, IndexerError, InvalidQuestion, Source
from kvevents.message import Publisher

NO_EVENTS_YET = "no events yet: nothing was received from this source"
MISSED_START = "gap: what the engine announced before we listened is unknown"
GAP = "gap: messages were lost"
ASKED_AGAIN = "behind: messages were asked for again, and are on their way"
RESTORED = "behind: loaded from a snapshot, and what was said since was not had yet"
RECONNECTED = "unsure: the connection was lost, and what was said meanwhile cannot be asked for"
NOT_REACHED = f"{UNREACHABLE}: nothing was heard of this source for long"
UNSURE = "unsure: messages may be missing, and could not be had again"
UNREAD = "unread: events were announced that could not be used"
FAILED = "error: events could not be applied"


class Trust:
    """Weighs what is known against each source. `sources_of` gives the sources that a publisher speaks for.

    A publisher that cannot be reached goes before one that is behind, and that before what the numbers of a source's
    messages mean: its verdict. Each is kept while another one shows.
    """

    def __init__(self, index: Index, sources_of: Callable[[Publisher], list[Source]]) -> None:
        self._index = index
        self._sources_of = sources_of
        self._verdicts: dict[Source, str] = {}
        self._unread: set[Source] = set()
        """Sources of which events could not be used since they were known to hold nothing."""
        self._behind: dict[Publisher, str] = {}
        self._unreachable: set[Publisher] = set()

    def judge(self, publisher: Publisher, source: Source, reason: str) -> None:
        """Say what the numbers of a source's messages mean for it, "" where nothing. Shown when nothing is worse."""
        self._verdicts[source] = reason
        if reason == UNREAD:
            self._unread.add(source)
        if publisher not in self._behind and publisher not in self._unreachable:
            self._show(publisher, source)

    def renew(self, source: Source) -> None:
        """Hear that a source holds nothing: what could not be read before is of no interest any more."""
        self._unread.discard(source)

    def verdict(self, source: Source) -> str:
        """Give what was judged last; what could not be read is held against a source even if nothing is missing."""
        return self._verdicts.get(source, NO_EVENTS_YET) or (UNREAD if source in self._unread else "")

    def call_behind(self, publisher: Publisher, reason: str) -> None:
        """Say why a publisher's sources are behind, "" where they are not."""
        if self._behind.get(publisher, "") == reason:
            return
        if reason:
            self._behind[publisher] = reason
        else:
            del self._behind[publisher]
        self.show(publisher)

    def call_unreachable(self, publisher: Publisher, *, is_so: bool) -> None:
        """Say whether a publisher cannot be reached."""
        (self._unreachable.add if is_so else self._unreachable.discard)(publisher)
        self.show(publisher)

    def call_failed(self, source: Source) -> None:
        """Say that events of a source were not applied, whatever else shows."""
        self._verdicts[source] = FAILED
        with suppress(IndexerError):  # it may have been forgotten meanwhile
            self._index.degrade(source, FAILED)

    def show(self, publisher: Publisher) -> None:
        """Say to the index what the sources of a publisher are worth."""
        for source in self._sources_of(publisher):
            self._show(publisher, source)

    def _show(self, publisher: Publisher, source: Source) -> None:
        reason = self.verdict(source)
        if publisher in self._unreachable:
            reason = NOT_REACHED
        elif publisher in self._behind:
            reason = self._behind[publisher]
        with suppress(InvalidQuestion):  # it said nothing yet, or was forgotten meanwhile
            self._index.degrade(source, reason)

    def forget(self, pod: str) -> None:
        """Forget what is held against a pod."""
        for source in [source for source in self._verdicts if source.pod == pod]:
            del self._verdicts[source]
            self._unread.discard(source)
        for publisher in [publisher for publisher in chain(self._behind, self._unreachable) if publisher.pod == pod]:
            self._behind.pop(publisher, None)
            self._unreachable.discard(publisher)
