# The control plane as an image: API, worker, bucket server and migrations, by command (docker-compose.yml).
FROM python:3.11-slim-bookworm AS build
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/heliostat
COPY pyproject.toml requirements.lock ./
# The lock without the developers' tools: same versions, taken as constraints.
RUN uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --constraint requirements.lock \
      pyproject.toml --group server --group aws --group gcp --group local -o image.lock \
 && uv venv --quiet .venv \
 && uv pip sync --quiet --compile-bytecode --link-mode copy --python .venv/bin/python image.lock

FROM python:3.11-slim-bookworm
# Fixed ids: volumes outlive images.
RUN groupadd --gid 10001 heliostat \
 && useradd --uid 10001 --gid 10001 --create-home heliostat \
 && install --directory --owner heliostat --group heliostat --mode 0700 /var/lib/heliostat
WORKDIR /opt/heliostat
COPY LICENSE ./
COPY --from=build /opt/heliostat/.venv .venv
COPY pyproject.toml installation.py server.py worker.py ./
COPY heliostat heliostat
COPY api api
COPY workflows workflows
COPY activities activities
COPY clouds clouds
COPY agent agent
COPY store store
COPY runtime runtime
ENV PATH=/opt/heliostat/.venv/bin:$PATH \
    PYTHONPATH=/opt/heliostat \
    PYTHONUNBUFFERED=1 \
    HELIOSTAT_HOME=/var/lib/heliostat \
    HELIOSTAT_LOG_FORMAT=json
USER heliostat
VOLUME /var/lib/heliostat
EXPOSE 8700
STOPSIGNAL SIGTERM
CMD ["python", "server.py"]
