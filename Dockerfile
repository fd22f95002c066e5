# An image for NVIDIA GPUs: torch's CUDA build, the kernels of csrc/ compiled, a user without rights.
#
#   docker build --build-arg UID="$(id -u)" -t megatron-deepseek .
#   docker run --rm --gpus all --ipc host --network host -v "$PWD/runs:/opt/megatron_deepseek/runs" -v /data:/data \
#       megatron-deepseek --nproc_per_node 8 pretrain_deepseek.py --model deepseek-v2-lite ...
#
# The entry is tools/launch.py. The scripts of examples/ start with --entrypoint bash and their name as the first argument.
# docs/docker.md has both. CUDA is the version that torch's wheel is built for; the driver's must not be below it.
ARG CUDA=13.0.2

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/opt/megatron_deepseek/constraints.txt
WORKDIR /opt/megatron_deepseek
COPY constraints.txt ./
# Apart from the rest, which changes more often: torch and CUDA's libraries are most of the image.
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install "$(grep '^torch==' constraints.txt)" \
    && /opt/venv/bin/python -c 'import torch; assert torch.version.cuda, "this torch has no CUDA"'
COPY . .
RUN /opt/venv/bin/pip install --editable '.[tensorboard,data,yaml,wandb]' \
    && MEGATRON_DEEPSEEK_CUDA=1 /opt/venv/bin/python csrc/build.py --jobs 8 \
    && rm -rf build

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
ARG UID=1000
RUN useradd --create-home --non-unique --uid "${UID}" trainer \
    && install --directory --owner "${UID}" /opt/megatron_deepseek/runs
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/megatron_deepseek /opt/megatron_deepseek
ENV PATH=/opt/venv/bin:${PATH} VIRTUAL_ENV=/opt/venv PYTHONUNBUFFERED=1
WORKDIR /opt/megatron_deepseek
USER ${UID}
ENTRYPOINT ["python", "tools/launch.py"]
CMD ["--help"]
