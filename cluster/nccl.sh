# shellcheck shell=bash
# Settings of NCCL and of PyTorch's use of it; sourced by launch.sh. Values set in the submitting shell win.
# Site-specific settings (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, a cloud's plugins) belong in that shell.

# Warnings only: INFO writes some hundred lines per rank at the start.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# InfiniBand resends a lost packet after 4 us x 2^timeout, up to seven times. NCCL's default of 20 (4 s) ends a run when
# the fabric reroutes around a failed switch; 22 waits 17 s each time. It has no effect on Ethernet without RoCE.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# NVLS multicast buffers take GPU memory per communicator, and a run has many (tensor, data, pipeline, replica). The
# estimates in docs/memory.md do not count them. 1 may be faster where memory is left; neither is measured here.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# Megatron's sequence parallelism relies on the order of kernel launches, which one hardware queue keeps.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Packs differ in length, so freed blocks rarely fit the next step; growing segments waste less memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
