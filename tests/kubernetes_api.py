"""The part of the Kubernetes API that a watcher of pods uses: list, then watch, as the API server answers them.

The pod documents are those of `kubectl get pod -o json`, cut to what matters; versions, event kinds, the 410 in a
stream and the 403 are the API's own (https://kubernetes.io/docs/reference/using-api/api-concepts/).
"""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import lightkube
from lightkube.config.kubeconfig import SingleConfig
from lightkube.config.models import Cluster, Context, User


def pod_document(name, ip, uid, *, ready=True, phase="Running", labels=None, annotations=None):
    """A pod as the API gives it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "inference",
            "uid": uid,
            "creationTimestamp": "2026-06-01T10:00:00Z",
            "labels": {"app": "vllm"} | (labels or {}),
            "annotations": annotations or {},
        },
        "spec": {"containers": [{"name": "vllm", "image": "vllm/vllm-openai:v0.33.0"}]},
        "status": {
            "phase": phase,
            "podIP": ip,
            "podIPs": [{"ip": ip}] if ip else [],
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        },
    }


class KubernetesApi:
    """A server whose pods are `set` and `delete`d; `questions` are all that were asked, as (path, parameters)."""

    def __init__(self):
        self._changed = threading.Condition()
        self._pods = {}
        self._events = []
        self._version = 100
        self._oldest = 0
        self._cut = 0
        self.refuses = None
        self.questions = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                api._answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.port = self._server.server_address[1]

    def client(self):
        """A lightkube client of this server."""
        config = SingleConfig(
            context_name="test",
            context=Context(cluster="test", namespace="inference"),
            cluster=Cluster(server=f"http://127.0.0.1:{self.port}"),
            user=User(),
        )
        return lightkube.Client(config=config)

    def set(self, document):
        """Create a pod or change it."""
        with self._changed:
            name = document["metadata"]["name"]
            kind = "MODIFIED" if name in self._pods else "ADDED"
            self._note(kind, name, copy.deepcopy(document))

    def delete(self, name):
        """Delete a pod: it is marked first, and gone then, as with a grace period."""
        with self._changed:
            document = copy.deepcopy(self._pods[name])
            document["metadata"]["deletionTimestamp"] = "2026-06-01T11:00:00Z"
            self._note("MODIFIED", name, document)
            self._note("DELETED", name, copy.deepcopy(document))

    def mark_deleted(self, name):
        """Begin to delete a pod that takes its time."""
        with self._changed:
            document = copy.deepcopy(self._pods[name])
            document["metadata"]["deletionTimestamp"] = "2026-06-01T11:00:00Z"
            self._note("MODIFIED", name, document)

    def compact(self):
        """Forget all history, so that every older version is answered with 410."""
        with self._changed:
            self._events.clear()
            self._oldest = self._version
            self._cut += 1
            self._changed.notify_all()

    def change_unseen(self, *documents, gone=()):
        """Change pods while nobody can be told: all watches end, and their versions are too old."""
        with self._changed:
            for document in documents:
                self._note("MODIFIED", document["metadata"]["name"], document)
            for name in gone:
                del self._pods[name]
            self._version += 1
            self.compact()

    def cut(self):
        """End all watches."""
        with self._changed:
            self._cut += 1
            self._changed.notify_all()

    def close(self):
        self.refuses = 503
        self.cut()
        self._server.shutdown()
        self._server.server_close()

    def _note(self, kind, name, document):
        self._version += 1
        document["metadata"]["resourceVersion"] = str(self._version)
        if kind == "DELETED":
            del self._pods[name]
        else:
            self._pods[name] = document
        self._events.append((self._version, {"type": kind, "object": document}))
        self._changed.notify_all()

    def _answer(self, request):
        url = urlsplit(request.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.questions.append((url.path, asked))
        if self.refuses is not None:
            reason = {403: "Forbidden", 503: "ServiceUnavailable"}[self.refuses]
            self._send(request, self.refuses, self._status(self.refuses, reason, "pods is forbidden"))
        elif asked.get("watch") == "true":
            self._stream(request, int(asked.get("resourceVersion", "0")))
        else:
            with self._changed:
                items = [
                    {k: v for k, v in pod.items() if k not in ("kind", "apiVersion")} for pod in self._pods.values()
                ]
                version = {"resourceVersion": str(self._version)}
            self._send(request, 200, {"kind": "PodList", "apiVersion": "v1", "metadata": version, "items": items})

    def _stream(self, request, version):
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        with self._changed:
            cut = self._cut
        try:
            while True:
                with self._changed:
                    if version < self._oldest:
                        gone = self._status(410, "Expired", f"too old resource version: {version} ({self._oldest})")
                        lines = [{"type": "ERROR", "object": gone}]
                    else:
                        lines = [event for at, event in self._events if at > version]
                        version = max([version, *(at for at, _ in self._events)])
                    if not lines:
                        if self._cut != cut:
                            break
                        self._changed.wait(5)
                for line in lines:
                    data = json.dumps(line).encode() + b"\n"
                    request.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    if line["type"] == "ERROR":
                        request.wfile.write(b"0\r\n\r\n")
                        return
            request.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            request.close_connection = True

    def _send(self, request, code, body):
        data = json.dumps(body).encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    @staticmethod
    def _status(code, reason, message):
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
