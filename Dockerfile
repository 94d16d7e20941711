# One image for init, worker and ingress; docker-compose.yml gives the command.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY requirements.lock requirements-dev.lock ./
# The build's own tools stay here; only what runs goes into the image below.
RUN pip install --require-hashes --only-binary=:all: -r requirements-dev.lock \
 && python -m venv /opt/orderstream \
 && /opt/orderstream/bin/pip install --require-hashes --only-binary=:all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
# The import package holds links into the folders: it needs both.
COPY orderstream orderstream
COPY streams streams
COPY agents agents
COPY tables tables
COPY http http
COPY jobs jobs
COPY lua lua
COPY sql sql
COPY bench bench
RUN pip wheel --no-deps --no-build-isolation -w /wheels . \
 && /opt/orderstream/bin/pip install --no-deps /wheels/*.whl

FROM python:3.11.14-slim-bookworm
ENV PATH=/opt/orderstream/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/orderstream orderstream
COPY --from=build /opt/orderstream /opt/orderstream
WORKDIR /var/lib/orderstream
USER orderstream
ENTRYPOINT ["orderstream"]
CMD ["--help"]
