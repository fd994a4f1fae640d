# One image with everything: Dagster, the gateway, the console and the command line. See docs/how-to/services.md.
#
#   docker build -t finetune-pipeline .
#
# Arguments: TORCH_INDEX_URL and CMAKE_ARGS, as for `make setup` (docs/how-to/install.md).
FROM python:3.11.13-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ARG TORCH_INDEX_URL
ARG CMAKE_ARGS
COPY . .
RUN make setup

FROM python:3.11.13-slim-bookworm
# libgomp1: llama.cpp's threads; git: Modelfiles in a repository, and the source `code`.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 finetune \
    && install -d -o finetune /data
COPY --from=build /app /app
ENV PATH=/app/.venv/bin:$PATH FINETUNE_HOME=/data
WORKDIR /app
USER finetune
VOLUME /data
EXPOSE 3000 8484 8501
ENTRYPOINT ["finetune"]
# Reached from outside the container only through the ports that are published.
CMD ["up", "--host", "0.0.0.0", "--ui-host", "0.0.0.0"]
