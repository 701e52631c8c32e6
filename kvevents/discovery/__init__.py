"""Where pods come from: lists, files, DNS, Kubernetes, SGLang servers, requests. One `Follower` asks them all."""

from kvevents.discovery.base import Discovery, Endpoint, Found
from kvevents.discovery.dns import DnsDiscovery, DnsFollow
from kvevents.discovery.entry import PodBody, PodEntry, found_in, found_of
from kvevents.discovery.file import FileDiscovery
from kvevents.discovery.follower import Follower, Target
from kvevents.discovery.identity import Identity, host_of
from kvevents.discovery.kubernetes import KubernetesDiscovery, KubernetesFollow
from kvevents.discovery.sglang import SglangDiscovery, SglangFollow
from kvevents.discovery.subscriptions import Subscriptions

__all__ = [
    "Discovery",
    "DnsDiscovery",
    "DnsFollow",
    "Endpoint",
    "FileDiscovery",
    "Follower",
    "Found",
    "Identity",
    "KubernetesDiscovery",
    "KubernetesFollow",
    "PodBody",
    "PodEntry",
    "SglangDiscovery",
    "SglangFollow",
    "Subscriptions",
    "Target",
    "found_in",
    "found_of",
    "host_of",
]
