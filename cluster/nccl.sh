# shellcheck shell=bash
# Settings of NCCL and of PyTorch's use of it; sourced by launch.sh. What the submitting shell has set stays as it is.
# Site-specific ones (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, plugins of a cloud) belong into that shell.

# Only what is wrong: INFO writes some hundred lines per rank at the start.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# InfiniBand resends a lost packet after 4 us x 2^timeout, seven times. NCCL's 20 (4 s) ends a run when the fabric reroutes
# around a failed switch; 22 waits 17 s a time. On Ethernet without RoCE it does nothing.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# NVLS multicast buffers cost GPU memory per communicator, and one run has many (tensor, data, pipeline, replica): the
# footprint of docs/memory.md does not count them. 1 may be faster where memory is left; neither is measured here.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# Megatron's sequence parallelism relies on the order in which kernels were launched; one hardware queue keeps it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A collective that hangs is ended after the process group's timeout. The flight recorder keeps each rank's last
# collectives and then writes them to a file per rank: the rank whose list is short is the culprit (torchfrtrace).
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${logs:?set by launch.sh}/flight_recorder_}
# Packs differ in length, so blocks of freed memory fit the next step badly; segments that grow waste less.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
