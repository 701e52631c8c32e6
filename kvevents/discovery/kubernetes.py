"""Pods of Kubernetes by their labels, through lightkube: listed once, then watched."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from kvevents.discovery.base import Follow, Found
from kvevents.errors import DiscoveryError, SubscriptionError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from lightkube import Client
    from lightkube.operators import Operator
    from lightkube.resources.core_v1 import Pod

TIMEOUT_S = 10.0


class KubernetesFollow(Follow, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which pods, and how to follow them."""

    label_selector: Annotated[str, Meta(min_length=1)]
    """As kubectl takes it: ``app=vllm,stage in (prod,canary)``."""
    namespace: str = ""
    """None: that of the service account or the kubeconfig."""
    model_label: str = ""
    """A label of the pods whose value is their model."""
    model_annotation: str = ""
    """The same for an annotation, which may hold a slash."""
    only_ready: bool = True
    """Leave out pods that are not ready; else those that have an address and run are followed."""


class KubernetesDiscovery:
    """The pods of one namespace that have certain labels.

    A pod is there as long as it runs, has an address, is ready and is not being deleted; its UID tells one life of
    a name from the next. When nothing was heard for `quiet_s` the watch is taken up again where it was: a
    connection that died without a word is not waited for.
    """

    def __init__(
        self, follow: KubernetesFollow, *, quiet_s: float = 30.0, connect: "Callable[[], Client] | None" = None
    ) -> None:
        self._follow = follow
        self._quiet_s = quiet_s
        self._connect = connect or _connect

    @property
    def label(self) -> str:
        """What the source is called in logs."""
        return f"kubernetes {self._follow.namespace or '(own namespace)'} {self._follow.label_selector}"

    def watch(self, stop: threading.Event) -> Iterator[Sequence[Found]]:
        """Give the pods after each change. Raises `DiscoveryError`; the next call lists them anew."""
        try:
            import httpx2
            import lightkube
            import msgspec
        except ImportError as error:
            raise DiscoveryError(
                f"{self.label}: needs a package that is not installed: pip install kv-cache-indexer[kubernetes]"
            ) from error
        try:
            # each time anew: closing the client is what closes a stream that was left
            with self._connect() as client:
                _bound_silence(client, self._quiet_s)
                yield from self._follow_changes(client, stop)
        except httpx2.HTTPStatusError as error:
            if _status(error) != 410:  # what it knows is too old to go on from: list anew, now
                raise DiscoveryError(f"{self.label}: {_why(error)}") from error
        except (httpx2.HTTPError, lightkube.ConfigError, msgspec.MsgspecError, OSError, ValueError) as error:
            raise DiscoveryError(f"{self.label}: {error or type(error).__name__}") from error

    def _follow_changes(self, client: "Client", stop: threading.Event) -> Iterator[Sequence[Found]]:
        import httpx2
        from lightkube.resources.core_v1 import Pod

        namespace, labels = self._follow.namespace or client.namespace, _selector(self._follow.label_selector)
        listed = client.list(Pod, namespace=namespace, labels=labels)
        pods = {_uid(pod): pod for pod in listed}
        version = listed.resourceVersion
        while not stop.is_set():
            yield [found for found in map(self._found, pods.values()) if found is not None]
            try:
                for change, pod in client.watch(Pod, namespace=namespace, labels=labels, resource_version=version):
                    version = (pod.metadata and pod.metadata.resourceVersion) or version
                    if change == "DELETED":
                        pods.pop(_uid(pod), None)
                    elif change in ("ADDED", "MODIFIED"):
                        pods[_uid(pod)] = pod
                    yield [found for found in map(self._found, pods.values()) if found is not None]
            except httpx2.ReadTimeout:
                continue

    def _found(self, pod: "Pod") -> Found | None:
        """Give a pod as it is to be followed; None where it is not to be."""
        follow, metadata, status = self._follow, pod.metadata, pod.status
        if metadata is None or status is None or not metadata.name or not status.podIP:
            return None
        if metadata.deletionTimestamp is not None or status.phase != "Running":
            return None
        ready = any(one.type == "Ready" and one.status == "True" for one in status.conditions or ())
        if follow.only_ready and not ready:
            return None
        model = (metadata.labels or {}).get(follow.model_label) or (metadata.annotations or {}).get(
            follow.model_annotation
        )
        try:
            endpoints = follow.endpoints(status.podIP, str(model or ""))
        except SubscriptionError:  # an address that is none: the others are followed all the same
            return None
        return Found(
            name=metadata.name,
            endpoints=endpoints,
            uid=metadata.uid or "",
            ip=status.podIP,
            port=follow.service_port,
            aliases=(f"{metadata.name}.{metadata.namespace}", f"{metadata.namespace}/{metadata.name}"),
        )


def _connect() -> "Client":
    """Connect as the service account of this pod, or as the kubeconfig says."""
    import httpx2
    import lightkube

    return lightkube.Client(timeout=httpx2.Timeout(TIMEOUT_S))


def _bound_silence(client: "Client", quiet_s: float) -> None:
    """Let a watch end when nothing came for so long; lightkube itself would wait for ever."""
    # it has no option for it: a transport of our own would have to do the certificates too
    client._client._watch_timeout.read = quiet_s


def _selector(text: str) -> "dict[str, str | Operator[Any] | Iterable[Any] | None]":
    # lightkube has operators for the parts of a selector; a label that must exist it sends as it is written
    return {text: None}


def _uid(pod: "Pod") -> str:
    metadata = pod.metadata
    return "" if metadata is None else metadata.uid or metadata.name or ""


def _status(error: Exception) -> int | None:
    """Give the HTTP status of an error, which in a watch is a line of its own instead of an answer."""
    told = getattr(error, "status", None)
    code = getattr(told, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _why(error: Exception) -> str:
    hint = {
        401: "; is the service account's token mounted?",
        403: "; its Role needs get, list and watch of pods, see deploy/kubernetes",
    }.get(_status(error) or 0, "")
    return f"{' '.join(str(error).split())}{hint}"
