// A CUDA device that does nothing, for a build of PyTorch without CUDA: streams, events, the hooks that autograd and
// FakeTensorMode ask for, and the choice among kernels of attention. Preloaded, it lets fake tensors be on "cuda:0". No kernel is ever run.

#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {

// PyTorch looks the hooks up by this name.
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace at::native {

// Which kernel scaled_dot_product_attention takes on an H100, for heads of up to 256 channels; without an answer it would
// be the one that stores all scores.
static int64_t chosen_attention(
    const Tensor& query,
    const Tensor&,
    const Tensor&,
    const std::optional<Tensor>& mask,
    double,
    bool,
    std::optional<double>,
    bool) {
  constexpr int64_t kFlash = 1, kMemoryEfficient = 2;
  const auto dtype = query.scalar_type();
  const bool is_half = dtype == at::kBFloat16 || dtype == at::kHalf;
  return is_half && !(mask.has_value() && mask->defined()) ? kFlash : kMemoryEfficient;
}

REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &chosen_attention)

}  // namespace at::native

namespace {

// An operator that CUDA has a kernel of, and that is taken in several steps on devices that have none.
at::Tensor silu_backward(const at::Tensor&, const at::Tensor&) {
  TORCH_CHECK(false, "no kernel runs on the fake device");
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("silu_backward", &silu_backward);
}

}  // namespace
