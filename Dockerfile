# docker build -t msd .                                                                  (CPU)
# docker build -t msd --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# docker run --rm -v "$PWD/runs:/runs" msd demo --out /runs/demo
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=diffusers
RUN command -v python3 && python3 -m venv --help > /dev/null 2>&1 \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/msd
ENV PATH=/opt/msd/bin:$PATH PYTHONUNBUFFERED=1
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir --extra-index-url ${TORCH_INDEX} "/src[${EXTRAS}]"
WORKDIR /runs
ENTRYPOINT ["msd"]
CMD ["--help"]
