"""The messages of our services, and of the one of llm-d's that is asked, as `proto/` describes them.

What is kept is not code that a generator wrote but the description that it reads (`make proto`): generated code must
be made anew for every other major version of protobuf, a description never.
"""

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from scorer import InvalidRequest

SCHEMA = Path(__file__).with_name("schema.binpb")
"""The services that are served."""
TOKENIZATION = Path(__file__).with_name("tokenization.binpb")
"""The one that is asked (`kvindex.llmd_tokenizer`)."""

MessageType: TypeAlias = Any
"""A class of messages, made from its description when the program runs."""


class Method(NamedTuple):
    """A call of a service."""

    service: str
    name: str
    request: MessageType
    response: MessageType


class Schema:
    """All calls by name, in a pool of their own, so that no other package's messages of the same names are in the way.

    `path` is the description. `more` are those of services that others implement, for reflection to show.
    """

    def __init__(self, path: Path, *more: bytes) -> None:
        self.pool = descriptor_pool.DescriptorPool()
        files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
        for file in (*(one.SerializeToString() for one in files), *more):
            self.pool.AddSerializedFile(file)
        self.methods = {
            method.name: Method(service, method.name, self._class(method.input_type), self._class(method.output_type))
            for file in files
            for described in file.service
            for service in [f"{file.package}.{described.name}"]
            for method in described.method
        }

    def _class(self, name: str) -> MessageType:
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name.lstrip(".")))


def parse(kind: MessageType, payload: bytes) -> Any:  # noqa: ANN401
    """Read a message. Raises `InvalidRequest` for bytes that are none; fields that nobody knows are skipped."""
    try:
        return kind.FromString(payload)
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(
            f"request: {len(payload)} bytes are no {name} (wire format, or text that is no UTF-8)"
        ) from error
