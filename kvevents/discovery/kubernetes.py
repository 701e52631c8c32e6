"""Pods of Kubernetes by their labels, through lightkube: listed once, then watched."""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from kvevents.discovery.base import Follow, Found
from kvevents.errors import DiscoveryError

if TYPE_CHECKING:
    from lightkube import Client
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

    def __init__(self, follow: KubernetesFollow, *, quiet_s: float = 30.0, client: "Client | None" = None) -> None:
        self._follow = follow
        self._quiet_s = quiet_s
        self._client = client

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
            client = self._client = self._client or _connect(self._quiet_s)
            yield from self._follow_changes(client, stop)
        except httpx2.HTTPStatusError as error:
            if _status(error) != 410:  # what it knows is too old to go on from: list anew, now
                raise DiscoveryError(f"{self.label}: {_why(error)}") from error
        except (httpx2.HTTPError, lightkube.ConfigError, msgspec.MsgspecError, OSError, ValueError) as error:
            raise DiscoveryError(f"{self.label}: {error or type(error).__name__}") from error

    def _follow_changes(self, client: "Client", stop: threading.Event) -> Iterator[Sequence[Found]]:
        import httpx2
        from lightkube.resources.core_v1 import Pod

        asked = {"namespace": self._follow.namespace or None, "labels": _selector(self._follow.label_selector)}
        listed = client.list(Pod, **asked)
        pods = {_uid(pod): pod for pod in listed}
        version = listed.resourceVersion
        while not stop.is_set():
            yield [found for found in map(self._found, pods.values()) if found is not None]
            try:
                for change, pod in client.watch(Pod, resource_version=version, **asked):
                    version = (pod.metadata and pod.metadata.resourceVersion) or version
                    if change == "DELETED":
                        pods.pop(_uid(pod), None)
                    elif change in ("ADDED", "MODIFIED"):
                        pods[_uid(pod)] = pod
                    yield [found for found in map(self._found, pods.values()) if found is not None]
            except httpx2.ReadTimeout:
                continue
