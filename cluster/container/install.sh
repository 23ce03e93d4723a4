#!/bin/bash
# Installs what training needs on Debian 12 or a like system with Python 3.11, in three steps, so that an image keeps
# the long ones while only sources change. The Dockerfile, bitdance.def and the SkyPilot file all call it:
#   install.sh system                       packages of the system, as root
#   install.sh dependencies FOLDER CHECKOUT a virtual environment in FOLDER: what setup.cfg requires, in the versions of
#                                           constraints.txt
#   install.sh package FOLDER CHECKOUT      the package itself, from CHECKOUT, into it
# EXTRAS names the optional groups of setup.cfg to install besides, by spaces [pack tensorboard].
set -euo pipefail

readonly SYSTEM=(
    python3 python3-venv
    # Triton compiles what launches its kernels when training starts (parallel.compile, FlexAttention).
    gcc g++ libc6-dev python3-dev
    # NCCL loads these at run time to talk over InfiniBand and RoCE. Without them it uses TCP, and says so only with
    # NCCL_DEBUG=INFO.
    libibverbs1 librdmacm1 ibverbs-providers
    # S3 and W&B are reached over TLS.
    ca-certificates
)

# What setup.cfg requires, one a line.
requirements() { # checkout, extras ...
    python3 - "$@" <<'PYTHON'
import configparser, sys
from pathlib import Path

folder, *extras = sys.argv[1:]
config = configparser.ConfigParser()
config.read_string(Path(folder, "setup.cfg").read_text(encoding="utf-8"))
wanted = [config["options"]["install_requires"]]
wanted += [config["options.extras_require"][extra] for extra in extras]
print(*(line for group in wanted for line in group.splitlines() if line.strip() and not line.startswith("#")), sep="\n")
PYTHON
}

step=${1:-}
case $step in
system)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${SYSTEM[@]}"
    rm -rf /var/lib/apt/lists/*
    ;;
dependencies)
    environment=$2 checkout=$3
    read -ra extras <<<"${EXTRAS-pack tensorboard}"
    python3 -m venv "$environment"
    pip=("$environment/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --quiet
        --constraint "$checkout/constraints.txt")
    # torch first: DeepSpeed's build looks for it. On x86_64 PyPI's torch brings CUDA's libraries, so no base image with
    # CUDA is needed; the driver comes from the machine.
    "${pip[@]}" torch setuptools wheel
    requirements "$checkout" "${extras[@]}" >"$environment/requirements.txt"
    # DeepSpeed's compiled operators are not used, and would need CUDA's compiler.
    DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation --requirement "$environment/requirements.txt"
    ;;
package)
    environment=$2 checkout=$3
    "$environment/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --quiet --no-deps \
        --no-build-isolation --editable "$checkout"
    # The root may be read-only when it runs.
    "$environment/bin/python" -m compileall -q "$checkout/bitdance_scale" "$checkout/cluster" "$checkout/pipelines"
    ;;
*)
    echo "install.sh: '$step' is no step: system, dependencies FOLDER CHECKOUT or package FOLDER CHECKOUT" >&2
    exit 2
    ;;
esac
