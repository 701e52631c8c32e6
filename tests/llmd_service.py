"""llm-d's tokenization service, in its place: on real sockets, and failing where a test says so.

It reads and writes its bytes by hand, by the published field numbers: nothing of it comes from our own description of
the messages.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc

from .grpc_service import field, fields


def texts(data, *repeated):
    """The fields of a message by number; those that may be there more than once as lists."""
    found = {number: [] for number in repeated}
    for number, value in fields(data):
        if number in repeated:
            found[number].append(value)
        else:
            found[number] = value.decode() if isinstance(value, bytes) else value
    return found


def answered(ids, number, success):
    """An answer with ids under one number and success under another."""
    return field(number, list(ids)) + field(success, 1)


class Service(grpc.GenericRpcHandler):
    """Answers as llm-d's service does, with transformers.

    `fails` has what a method answers in its place: bytes, or a status with its message. `tamper` changes ids.
    """

    def __init__(self, tokenizer, address, models=("m",)):
        self.tokenizer = tokenizer
        self.models = models
        self.loaded = set()
        self.asked = []
        self.fails = {}
        self.options = [("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1)]
        self.server = grpc.server(ThreadPoolExecutor(8), options=self.options)
        self.server.add_generic_rpc_handlers((self,))
        self.port = self.server.add_insecure_port(address)
        self.server.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stop(None).wait()

    def service(self, details):
        package, _, name = details.method.rpartition("/")
        handler = getattr(self, name, None)
        if package != "/tokenization.TokenizationService" or handler is None:
            return None

        def handle(data, context):
            try:
                read, answer = handler(data)
            except LookupError as error:
                self.asked.append((name, None))
                context.abort(grpc.StatusCode.INTERNAL, str(error))
            self.asked.append((name, read))
            fails = self.fails.get(name)
            if callable(fails):
                fails = fails()
            if isinstance(fails, tuple):
                context.abort(*fails)
            return answer if fails is None else fails

        return grpc.unary_unary_rpc_method_handler(handle)

    def InitializeTokenizer(self, data):  # noqa: N802
        read = texts(data)
        if read[1] not in self.models:
            return read, field(2, f"Failed to initialize renderer for model: {read[1]}")
        self.loaded.add(read[1])
        return read, field(1, 1)

    def need(self, model):
        if model not in self.loaded:
            raise LookupError(f"Tokenizer not initialized for model: {model}")

    def Tokenize(self, data):  # noqa: N802
        read = texts(data)
        self.need(read[2])
        ids = self.tokenizer.encode(read[1], add_special_tokens=bool(read.get(3)))
        offsets = [0, 1] * len(ids)
        return read, answered(ids, 1, 2) + field(4, offsets)

    def RenderCompletion(self, data):  # noqa: N802
        read = texts(data)
        self.need(read[1])
        return read, field(1, "cmpl-1") + answered(self.tokenizer.encode(read.get(2, "")), 2, 3)

    def RenderChatCompletion(self, data):  # noqa: N802
        read = texts(data, 2)
        self.need(read[1])
        messages = []
        for message in read[2]:
            said = texts(message, 3)
            assert said.keys() <= {1, 2, 3, 4}
            content = [texts(part).get(2, "") for part in said[3]]
            made = {"role": said[1], "content": "\n".join(content) if content else said.get(2, "")}
            if 4 in said:
                made["tool_calls"] = json.loads(said[4])
            messages.append(made)
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=json.loads(read[3]) if 3 in read else None,
            chat_template=read.get(4) or None,
            tokenize=False,
            add_generation_prompt=bool(read.get(5, 1)),
            continue_final_message=bool(read.get(6)),
            **json.loads(read.get(7, "{}")),
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return read, field(1, "chat-1") + answered(ids, 2, 4)

    def calls(self, name):
        return sum(asked == name for asked, _ in self.asked)
