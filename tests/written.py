"""Files that pages and folders have: configurations, lists of pods, manifests. Can they be used?"""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kvevents.discovery import PodEntry, found_in
from kvindex.config import load

from .documents import Wrong


def check_data(language: str, text: str, folder: Path) -> None:
    """See that a block is a configuration, a list of pods, manifests, a compose or collector file that can be used."""
    try:
        things = [tomllib.loads(text)] if language == "toml" else list(yaml.safe_load_all(text))
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise Wrong(f"no {language.upper()}: {error}") from None
    for thing in things:
        try:
            if isinstance(thing, list):
                found_in(msgspec.convert(thing, list[PodEntry]))
            elif isinstance(thing, dict) and {"apiVersion", "kind"} <= thing.keys():
                load(None, environment_of(thing))
            elif isinstance(thing, dict) and {"receivers", "exporters"} <= thing.keys():
                check_collector(thing)
            elif isinstance(thing, dict) and "services" in thing:
                for service in thing["services"].values():
                    environ = service.get("environment") or {}
                    load(None, {key: str(value) for key, value in environ.items()})
            else:
                path = folder / f".block.{language}"
                path.write_text(text)
                load(path, {})
        except Exception as error:
            raise Wrong(f"{error}\n{text}") from error


def check_collector(thing: dict[str, Any]) -> None:
    """See that an OpenTelemetry collector takes traces by OTLP over HTTP, and that its pipelines name what there is."""
    for name, pipeline in thing["service"]["pipelines"].items():
        for kind, used in pipeline.items():
            if unknown := set(used) - thing[kind].keys():
                raise Wrong(f"service.pipelines.{name}.{kind}: there is no {', '.join(unknown)}")
    for receiver in thing["service"]["pipelines"]["traces"]["receivers"]:
        if receiver.startswith("otlp") and "http" in thing["receivers"][receiver]["protocols"]:
            return
    raise Wrong("service.pipelines.traces: nobody takes OTLP over HTTP")


def environment_of(manifest: Any) -> dict[str, str]:
    """Give the variables that a Kubernetes manifest sets for kvindex."""
    if isinstance(manifest, list):
        return {key: value for one in manifest for key, value in environment_of(one).items()}
    if not isinstance(manifest, dict):
        return {}
    found = environment_of(list(manifest.values()))
    for one in manifest.get("env") or []:
        if one["name"].startswith("KVINDEX_"):
            found[one["name"]] = one.get("value", "secret")
    return found
