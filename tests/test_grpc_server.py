"""The gRPC server beside the answers: health, reflection, its life, its schema."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc

from kvindex.answers import AnswerMetrics
from kvindex.config import GrpcConfig
from kvindex.errors import UserError
from kvindex.fleet import Fleet
from kvindex.rpc import serve_grpc
from kvindex.rpc.schema import SCHEMA, TOKENIZATION
from kvindex.stats import Asked

from .conftest import until
from .grpc_service import HEALTH, LLMD, MODEL, OURS, Service, field, fields, ours, words

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Service(tmp_path_factory.mktemp("tokenizers")) as running:
        yield running


def test_health():
    with Service() as service:
        for name in ("", "indexer.v1.IndexerService", "kvindex.v1.ScorerService"):
            asked = field(1, name) if name else b""
            assert fields(service.call(HEALTH + "Check", asked)) == [(1, 1)]  # SERVING
        assert service.refusal(HEALTH + "Check", field(1, "nobody"))[0] == grpc.StatusCode.NOT_FOUND
        watch = service.channel.unary_stream(HEALTH + "Watch")(field(1, "indexer.v1.IndexerService"), timeout=20)
        assert fields(next(watch)) == [(1, 1)]
        closing = threading.Thread(target=service.server.close)
        closing.start()
        assert fields(next(watch)) == [(1, 2)]  # NOT_SERVING
        watch.cancel()
        closing.join()


def test_reflection_describes_all_that_is_there(service):
    """As grpcurl does it: ask for the services, make messages of what is said, and call with them."""
    database = ProtoReflectionDescriptorDatabase(service.channel)
    assert set(database.get_services()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "indexer.v1.IndexerService",
        "kvindex.v1.ScorerService",
    }
    pool = descriptor_pool.DescriptorPool(database)
    for name in database.get_services():
        assert pool.FindServiceByName(name).methods
    method = pool.FindServiceByName("indexer.v1.IndexerService").FindMethodByName("GetPodScores")
    request = message_factory.GetMessageClass(method.input_type)(prompt=words(50), model_name=MODEL)
    answer = message_factory.GetMessageClass(method.output_type).FromString(
        service.call(LLMD, request.SerializeToString())
    )
    assert json_format.MessageToDict(answer) == {
        "scores": [{"pod": "pod-a", "score": 3.0}, {"pod": "pod-b", "score": 1.0}]
    }


def test_what_is_under_way_is_answered_before_the_end():
    with Service() as service:
        begun, go_on = threading.Event(), threading.Event()
        match = service.scorer.match

        def slow(*args, **kwargs):
            begun.set()
            assert go_on.wait(20)
            return match(*args, **kwargs)

        service.scorer.match = slow
        answer = service.channel.unary_unary(OURS).future(ours(), timeout=20)
        assert begun.wait(20)
        closing = threading.Thread(target=service.server.close)
        closing.start()
        # no new calls from the moment on in which it closes
        late = grpc.insecure_channel(f"127.0.0.1:{service.port}", options=[("grpc.use_local_subchannel_pool", 1)])

        def refused():
            try:
                late.unary_unary(HEALTH + "Check")(b"", timeout=20)
            except grpc.RpcError:
                return True
            return False

        assert until(refused)
        go_on.set()
        assert dict(fields(answer.result()))[5] == b"pod-a"
        closing.join()
        late.close()


def test_a_port_that_is_taken_is_said(service):
    config = GrpcConfig(port=service.port)
    with contextlib.ExitStack() as running, pytest.raises(UserError, match=f"grpc.port {service.port}.*choose another"):
        serve_grpc(config, service.scorer, service.followed, Asked(), AnswerMetrics(), running)


def test_without_the_packages_the_remedy_is_said():
    program = "import sys; sys.modules['grpc'] = None; from kvindex.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--grpc-port", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert answer.returncode == 2
    assert "kv-cache-indexer[grpc]" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr


def test_serve_answers_over_grpc_what_its_pods_hold():
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", "--grpc-port", "0"]
    with Fleet(3, num_blocks=256) as fleet:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("KVINDEX_")}
        environ["KVINDEX_PODS"] = json.dumps(fleet.endpoints())
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as serving:
            try:
                told = (json.loads(line) for line in serving.stderr)
                address = next(line["address"] for line in told if line.get("event") == "serving_grpc")
                until(lambda: all(pod.publisher.subscribers for pod in fleet.pods))
                prompts = [[*range(number, number + 200)] for number in range(3)]
                for number, prompt in enumerate(prompts):
                    for pod in range(number + 1):
                        fleet.step(pod, prompt)
                with grpc.insecure_channel(address) as channel:
                    for prompt in prompts:
                        held = {pod.name.encode(): pod.engine.hit_blocks(prompt) for pod in fleet.pods}
                        held = {pod: blocks for pod, blocks in held.items() if blocks}
                        asked = field(1, fleet.model) + field(2, prompt)

                        def agrees(asked=asked, held=held, channel=channel):
                            answer = fields(channel.unary_unary(OURS)(asked, timeout=20, wait_for_ready=True))
                            scores = [dict(fields(value)) for number, value in answer if number == 1]
                            return {one[1]: one[2] for one in scores} == held

                        until(agrees)
            finally:
                serving.terminate()
                rest = serving.stderr.read()
                serving.wait(30)
    assert serving.returncode == 0, rest
    assert '"stopped"' in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(("kept", "folders"), [(SCHEMA, ["indexer", "kvindex"]), (TOKENIZATION, ["tokenization"])])
def test_the_schema_is_what_the_proto_files_give(tmp_path, kept, folders):
    proto = ROOT / "proto"
    assert {path.name for path in proto.iterdir()} == {"indexer", "kvindex", "tokenization"}
    files = sorted(str(path.relative_to(proto)) for folder in folders for path in (proto / folder).rglob("*.proto"))
    made = tmp_path / "schema"
    assert protoc.main(["protoc", f"-I{proto}", f"--descriptor_set_out={made}", *files]) == 0
    read = [descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (made, kept)]
    assert read[0] == read[1], "run `make proto`"


def test_more_connections_than_there_may_be_end_at_once():
    with Service(max_connections=2) as running, contextlib.ExitStack() as stack:

        def comes():
            return stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20))

        first, second = comes(), comes()
        assert first.recv(100)  # its first frame, before ours
        assert second.recv(100)
        third = comes()
        with contextlib.suppress(ConnectionError):
            assert third.recv(100) == b""
        first.close()
        until(lambda: is_answered(running))


def is_answered(running):
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            return channel.unary_unary(OURS)(ours(), timeout=20)
        except grpc.RpcError:
            return None
