"""Tokenizers and chat templates as a configuration has them, and what they tell Prometheus."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.config import TokenizersConfig
from kvindex.errors import UserError
from kvindex.remote_tokenizer import VllmTokenizer
from scorer import PrefixStats, PrefixStore, Prompts, RemoteTokenizer, Renderer, Tokenizers


def open_prompts(config: TokenizersConfig, running: contextlib.ExitStack) -> Prompts:
    """Make what turns text into tokens; `running` closes it. Raises `UserError` for files that are not there."""
    for folder in config.folders:
        if not Path(folder).is_dir():
            raise UserError(f"tokenizers.folders: {folder}: no such folder")
    for name, model in config.models.items():
        if model.chat_template and not Path(model.chat_template).is_file():
            raise UserError(f"tokenizers.models.{name}.chat_template: {model.chat_template}: no such file")
    tokenizers = Tokenizers(config.folders, models=config.models, aliases=config.aliases, loras=config.loras)
    remote = _open_remote(config, tokenizers, running) if config.remote_url else None
    prompts = Prompts(
        tokenizers,
        store=PrefixStore(config.store_bytes) if config.store_bytes else None,
        renderer=Renderer(workers=config.threads, max_seconds=config.template_timeout_s),
        remote=remote,
        threads=config.threads,
        max_waiting=config.max_waiting,
        max_chars=config.max_chars,
        trust_templates=config.trust_templates,
    )
    running.callback(prompts.close)
    return prompts


def _open_remote(config: TokenizersConfig, tokenizers: Tokenizers, running: contextlib.ExitStack) -> RemoteTokenizer:
    """Take the kind of service that the URL's scheme says."""
    url, timeout_s = config.remote_url, config.remote_timeout_s
    scheme = url.partition(":")[0]
    if scheme not in ("http", "https", "grpc", "unix", "grpc+unix"):
        raise UserError(f"tokenizers.remote_url: {url}: expected http://, https://, grpc:// or unix:///")
    if scheme in ("http", "https"):
        vllm = VllmTokenizer(url, api_key=config.remote_api_key, timeout_s=timeout_s)
        running.callback(vllm.close)
        return vllm
    if config.remote_api_key:
        raise UserError(f"tokenizers.remote_api_key: {url} takes none; leave it out")
    try:
        from kvindex.llmd_tokenizer import LlmdTokenizer
    except ImportError as error:
        raise UserError(
            f"tokenizers.remote_url: {url}: {error}; install 'kv-cache-indexer[grpc]', or ask a vLLM (http://)"
        ) from error
    llmd = LlmdTokenizer(url, tokenizers=tokenizers, models=config.models, timeout_s=timeout_s)
    running.callback(llmd.close)
    return llmd


class PromptMetrics(Collector):
    """What the prefix store does."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        if self._prompts.store is not None:
            yield from _of_store(self._prompts.store.stats())


def _of_store(stats: PrefixStats) -> Iterator[Metric]:
    lookups = CounterMetricFamily("kvindex_prefix_store_lookups", "Texts by what was known of them", labels=["outcome"])
    for outcome, count in (("hit", stats.hits), ("miss", stats.misses), ("stood_aside", stats.stood_aside)):
        lookups.add_metric([outcome], count)
    yield lookups
    characters = CounterMetricFamily("kvindex_prefix_store_characters", "Characters of texts", labels=["from"])
    characters.add_metric(["store"], stats.characters_reused)
    characters.add_metric(["tokenizer"], stats.characters_tokenized)
    yield characters
    yield CounterMetricFamily("kvindex_prefix_store_evicted_chunks", "Chunks forgotten", value=stats.chunks_evicted)
    yield GaugeMetricFamily("kvindex_prefix_store_bytes", "Bytes held", value=stats.bytes_held)
