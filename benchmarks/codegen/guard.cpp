// A guard for CUDA devices that does nothing: PyTorch's operators ask for one, also where their tensors are fake.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct PretendedGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)

} // namespace
