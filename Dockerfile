# crossdock for GPU nodes. It has been neither built nor run by the project yet: it is read by people and by a test alone.
#
#   docker build -t crossdock:0.1.0 .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 crossdock:0.1.0 doctor
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" crossdock:0.1.0 train debug
#
# --ipc=host: NCCL and data workers share memory. memlock, and --device=/dev/infiniband where there is one: RDMA.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY crossdock crossdock
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# devel: its nvcc compiles DeepEP, for those who add it (docs/howto/deepep.md). torch brings its own CUDA libraries.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
# gcc and Python.h: Triton compiles the launchers of its kernels. ibverbs: NCCL over InfiniBand and RoCE.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        gcc ibverbs-providers libibverbs1 libnuma1 librdmacm1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/crossdock/bin:$PATH
COPY constraints.txt /opt/
COPY --from=wheel /wheel /opt/wheel
RUN python3 -m venv /opt/crossdock \
    && pip install --no-cache-dir -c /opt/constraints.txt "$(echo /opt/wheel/*.whl)[datasets,transformers,watch]"
# The number of tokens that reach a rank differs from step to step, which fragments the caching allocator's memory.
ENV PYTORCH_ALLOC_CONF=expandable_segments:True
WORKDIR /workspace
COPY configs configs
ENTRYPOINT ["crossdock"]
CMD ["--help"]
