FROM docker.io/library/rust:1-slim-bookworm AS core
WORKDIR /src
RUN command -v pip3 >/dev/null || { apt-get update && apt-get install -y --no-install-recommends python3-pip; }
COPY . .
RUN KVINDEX_BUILD_NATIVE=yes pip3 wheel --no-cache-dir --no-deps . -w /wheels

FROM docker.io/library/python:3.11-slim-bookworm AS build
RUN python -m venv /opt/kvindex
COPY requirements.lock .
# Only what the lock names, with its hash; the install below then takes the runtime part of it and nothing else.
RUN pip download --no-cache-dir --require-hashes -r requirements.lock -d /wheels
COPY --from=core /wheels /wheels
RUN /opt/kvindex/bin/pip install --no-cache-dir --no-index --find-links /wheels 'kv-cache-indexer[grpc,kubernetes,otel]' \
 && /opt/kvindex/bin/pip uninstall -y setuptools pip

FROM docker.io/library/python:3.11-slim-bookworm
# The folder is for snapshots: a volume that is mounted there for the first time takes its owner over.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin kvindex \
 && install -d -o 10001 -g 10001 /var/lib/kvindex
COPY --from=build /opt/kvindex /opt/kvindex
ENV PATH=/opt/kvindex/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 KVINDEX_HTTP_HOST=0.0.0.0 \
    KVINDEX_GRPC_HOST=0.0.0.0
USER 10001
# gRPC listens where KVINDEX_GRPC_PORT says, llm-d's clients expect 50051
EXPOSE 8080 50051
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('KVINDEX_HTTP_PORT', '8080') + '/healthz', timeout=2)"]
ENTRYPOINT ["kvindex"]
CMD ["serve"]
