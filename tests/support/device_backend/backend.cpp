// A device on host memory, registered as PyTorch's `PrivateUse1` backend.
//
// Every operator runs its CPU kernel on the memory of its arguments: the fallback below shows each
// tensor of the device to the kernel as a CPU tensor over the same storage, and hands the results
// back as tensors of the device. As on a GPU, tensors of the host and of the device do not mix, the
// device draws from generators of its own, has an autocast mode of its own, and runs backward passes
// on a thread of its own.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
const c10::Device kOnlyDevice(kDevice, 0);

bool on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDevice;
}

// ---- Memory ------------------------------------------------------------------------------------

c10::DataPtr relabelled(c10::DataPtr memory, c10::Device device) {
  void* data = memory.get();
  auto deleter = memory.get_deleter();
  void* context = memory.release_context();
  return {data, context, deleter, device};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    return relabelled(c10::GetCPUAllocator()->allocate(size), kOnlyDevice);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return c10::GetCPUAllocator()->raw_deleter();
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

DeviceAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

c10::Storage storage_over(c10::DataPtr memory, size_t size, c10::Allocator* of) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), size, std::move(memory), of, /*resizable=*/true);
}

// ---- Devices and streams: one of each, and all work is done when a call returns -------------------

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return kOnlyDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    setDevice(device);
    return kOnlyDevice;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() <= 0, "there is one test device, not ", device.index() + 1);
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kOnlyDevice); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard)

// ---- Generators ----------------------------------------------------------------------------------

// A generator of the device: a CPU generator behind another label.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(at::Generator cpu)
      : c10::GeneratorImpl(kOnlyDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(std::move(cpu)) {}

  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(cpu).seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(cpu.clone()); }

  at::Generator cpu;
};

at::Generator new_generator() {
  return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
}

const at::Generator& default_generator() {
  static const at::Generator generator = new_generator();
  return generator;
}

at::Generator cpu_generator(const c10::IValue& given) {
  const auto generator = given.isNone() ? default_generator() : given.toGenerator();
  TORCH_CHECK(
      generator.device().type() == kDevice,
      "Expected a '", kDevice, "' device type for generator but found '", generator.device(), "'");
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  at::Device getDeviceFromPtr(void*) const override { return kOnlyDevice; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto memory = allocator.allocate(size);
    std::memcpy(memory.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// ---- Operators -----------------------------------------------------------------------------------

// The tensors of one call, as the CPU kernel sees them and as the device does.
class Translation {
 public:
  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (tensor.is_sparse()) {
      const auto* parts = parts_of(tensor);
      auto cpu = joined(
          tensor, to_cpu(parts->indices()), to_cpu(parts->values()), c10::DispatchKey::SparseCPU);
      sparse_tensors.emplace_back(tensor, cpu);
      return cpu;
    }
    const auto& storage = tensor.storage();
    auto found = std::find_if(storages.begin(), storages.end(), [&](const auto& pair) {
      return pair.device.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl();
    });
    if (found == storages.end()) {
      // Borrowed: the tensors of the device keep the memory alive during the call.
      c10::DataPtr memory(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
      auto cpu = storage_over(std::move(memory), storage.nbytes(), c10::GetCPUAllocator());
      storages.push_back({storage, cpu, storage.data()});
      found = storages.end() - 1;
    }
    auto cpu = labelled(tensor, found->cpu, c10::DispatchKey::CPU);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      cpu.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    tensors.emplace_back(tensor, cpu);
    return cpu;
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined() || result.device().type() != c10::kCPU) {
      return result;
    }
    for (const auto* known : {&tensors, &sparse_tensors}) {
      for (const auto& [device, cpu] : *known) {
        if (cpu.is_same(result)) {
          return device;
        }
      }
    }
    if (result.is_sparse()) {
      const auto* parts = parts_of(result);
      return joined(
          result, to_device(parts->indices()), to_device(parts->values()),
          c10::DispatchKey::SparsePrivateUse1);
    }
    return labelled(result, device_storage(result.storage()), c10::DispatchKey::PrivateUse1);
  }

  // What a kernel did to the arguments beyond their entries: other sizes, memory or storage.
  void finish() {
    for (auto& [device, cpu, data] : storages) {
      auto* changed = cpu.unsafeGetStorageImpl();
      if (changed->data() != data) {
        auto memory = changed->set_data_ptr(c10::DataPtr(nullptr, c10::Device(c10::kCPU)));
        device.unsafeGetStorageImpl()->set_data_ptr_noswap(
            relabelled(std::move(memory), kOnlyDevice));
      }
      device.unsafeGetStorageImpl()->set_nbytes(changed->nbytes());
    }
    for (const auto& [device, cpu] : tensors) {
      auto* target = device.unsafeGetTensorImpl();
      if (cpu.sizes() == device.sizes() && cpu.strides() == device.strides() &&
          cpu.storage_offset() == device.storage_offset() &&
          device_storage(cpu.storage()).unsafeGetStorageImpl() ==
              device.storage().unsafeGetStorageImpl()) {
        continue;
      }
      target->set_storage_keep_dtype(device_storage(cpu.storage()));
      target->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
    for (const auto& [device, cpu] : sparse_tensors) {
      auto* target = parts_of(device);
      const auto* changed = parts_of(cpu);
      target->resize_(changed->sparse_dim(), changed->dense_dim(), cpu.sizes());
      target->set_indices_and_values_unsafe(
          to_device(changed->indices()), to_device(changed->values()));
      target->set_coalesced(changed->coalesced());
    }
  }

 private:
  struct Pair {
    c10::Storage device, cpu;
    const void* data;
  };

  static at::Tensor labelled(
      const at::Tensor& like, const c10::Storage& storage, c10::DispatchKey key) {
    c10::DispatchKeySet keys(key);
    if (like.is_conj()) {
      keys = keys.add(c10::DispatchKey::Conjugate);
    }
    if (like.is_neg()) {
      keys = keys.add(c10::DispatchKey::Negative);
    }
    if (like._is_zerotensor()) {
      keys = keys.add(c10::DispatchKey::ZeroTensor);
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(
        like.sizes(), like.strides(), like.storage_offset());
    return made;
  }

  static at::SparseTensorImpl* parts_of(const at::Tensor& sparse) {
    return static_cast<at::SparseTensorImpl*>(sparse.unsafeGetTensorImpl());
  }

  static at::Tensor joined(
      const at::Tensor& like, const at::Tensor& indices, const at::Tensor& values,
      c10::DispatchKey key) {
    auto made = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), like.dtype());
    const auto* parts = parts_of(like);
    parts_of(made)->resize_(parts->sparse_dim(), parts->dense_dim(), like.sizes());
    parts_of(made)->set_indices_and_values_unsafe(indices, values);
    parts_of(made)->set_coalesced(parts->coalesced());
    return made;
  }

  c10::Storage device_storage(const c10::Storage& cpu) {
    for (const auto& pair : storages) {
      if (pair.cpu.unsafeGetStorageImpl() == cpu.unsafeGetStorageImpl()) {
        return pair.device;
      }
    }
    auto* owner = new c10::Storage(cpu);
    c10::DataPtr memory(
        const_cast<void*>(cpu.data()), owner,
        [](void* context) { delete static_cast<c10::Storage*>(context); }, kOnlyDevice);
    storages.push_back({storage_over(std::move(memory), cpu.nbytes(), &allocator), cpu, cpu.data()});
    return storages.back().device;
  }

  std::vector<Pair> storages;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors, sparse_tensors;
};

// Operators that take indices of the host into tensors of the device, as they do on CUDA.
bool takes_host_indices(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" ||
      name == "aten::_unsafe_index_put";
}

struct Arguments {
  Translation& translation;
  bool host = false, device = false, first_on_device = false;

  at::Tensor tensor(const at::Tensor& given) {
    if (!given.defined()) {
      return given;
    }
    if (on_device(given)) {
      first_on_device = first_on_device || !host;
      device = true;
      return translation.to_cpu(given);
    }
    host = host || given.dim() > 0;
    return given;
  }

  c10::IValue operator()(const c10::IValue& given, const c10::Type& type) {
    if (given.isTensor()) {
      return tensor(given.toTensor());
    }
    if (given.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& element : given.toTensorVector()) {
        list.push_back(tensor(element));
      }
      return list;
    }
    if (given.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& element : given.toOptionalTensorList()) {
        list.push_back(element ? std::optional<at::Tensor>(tensor(*element)) : std::nullopt);
      }
      return list;
    }
    if (given.isDevice()) {
      return given.toDevice().type() == kDevice ? c10::Device(c10::kCPU) : given;
    }
    const bool generator = type.kind() == c10::TypeKind::GeneratorType ||
        (type.kind() == c10::TypeKind::OptionalType &&
         type.castRaw<c10::OptionalType>()->getElementType()->kind() ==
             c10::TypeKind::GeneratorType);
    return generator ? c10::IValue(cpu_generator(given)) : given;
  }
};

// What is done to tensors on their way to a kernel has been done to those of the device.
struct BelowCpu {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
};

// Runs the CPU kernel of any operator.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  Translation translation;
  Arguments translate{translation};
  const auto given = torch::jit::last(*stack, count).vec();
  torch::jit::drop(*stack, count);
  for (size_t i = 0; i < count; ++i) {
    stack->push_back(translate(given[i], *schema.arguments()[i].real_type()));
  }
  TORCH_CHECK(
      !(translate.host && translate.device) ||
          (takes_host_indices(schema.name()) && translate.first_on_device),
      "Expected all tensors to be on the same device, but found at least two devices, ",
      kOnlyDevice, " and cpu! (when checking arguments of ", schema.operator_name(), ")");
  BelowCpu below;
  op.callBoxed(stack);
  const size_t results = schema.returns().size();
  for (auto value = stack->end() - results; value != stack->end(); ++value) {
    if (value->isTensor()) {
      *value = translation.to_device(value->toTensor());
    } else if (value->isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& element : value->toTensorVector()) {
        list.push_back(translation.to_device(element));
      }
      *value = std::move(list);
    }
  }
  translation.finish();
}

// Copies between the host and the device.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Translation translation;
  const auto source = on_device(from) ? translation.to_cpu(from) : from;
  const auto target = on_device(to) ? translation.to_cpu(to) : to;
  BelowCpu below;
  target.copy_(source);
  translation.finish();
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  auto* target = self.unsafeGetTensorImpl();
  target->set_storage_keep_dtype(std::move(storage));
  if (stride.size() == size.size()) {
    target->set_sizes_and_strides(size, stride, offset);
  } else {
    target->set_storage_offset(offset);
    target->set_sizes_contiguous(size);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {size}, {});
}

// Recurrent layers take these cells on all devices but the CPU, which has no kernel for them.

at::Tensor with_bias(const at::Tensor& gates, const std::optional<at::Tensor>& bias) {
  return bias && bias->defined() ? gates.add(*bias) : gates;
}

std::tuple<at::Tensor, at::Tensor> gru_cell(
    const at::Tensor& input_gates, const at::Tensor& hidden_gates, const at::Tensor& hx,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  const auto in = with_bias(input_gates, input_bias).chunk(3, 1);
  const auto hidden = with_bias(hidden_gates, hidden_bias).chunk(3, 1);
  const auto reset = in[0].add(hidden[0]).sigmoid();
  const auto update = in[1].add(hidden[1]).sigmoid();
  const auto candidate = in[2].add(reset.mul(hidden[2])).tanh();
  return {hx.sub(candidate).mul(update).add(candidate), reset};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& input_gates, const at::Tensor& hidden_gates, const at::Tensor& cx,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  const auto sum = with_bias(input_gates, input_bias).add(with_bias(hidden_gates, hidden_bias));
  const auto gates = sum.chunk(4, 1);
  const auto kept = gates[1].sigmoid().mul(cx);
  const auto cy = kept.add(gates[0].sigmoid().mul(gates[2].tanh()));
  return {gates[3].sigmoid().mul(cy.tanh()), cy, sum};
}

// Above autograd, which would otherwise ask for kernels of their derivatives.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  // These choose a kernel by the device before they dispatch.
  for (const char* name : {"convolution", "convolution_backward", "_convolution"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
}

TORCH_LIBRARY_IMPL(aten, SparseCPU, m) {
  m.impl("_copy_from", &copy_from);
}

// Else these would be resolved by a copy, which begins with the same operator.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// ---- Autocast, with the lists of CUDA --------------------------------------------------------------

void cast_arguments(
    const c10::OperatorHandle& op, torch::jit::Stack* stack, at::ScalarType dtype) {
  c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKey::AutocastPrivateUse1);
  const size_t count = op.schema().arguments().size();
  for (auto value = stack->end() - count; value != stack->end(); ++value) {
    if (value->isTensor()) {
      *value = at::autocast::cached_cast(dtype, value->toTensor(), kDevice);
    } else if (value->isTensorList()) {
      *value = at::autocast::cached_cast(dtype, value->toTensorVector(), kDevice);
    }
  }
  op.callBoxed(stack);
}

void in_lower_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_arguments(op, stack, at::autocast::get_autocast_dtype(kDevice));
}

void in_single_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  cast_arguments(op, stack, at::kFloat);
}

void in_widest_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto widest = at::autocast::get_autocast_dtype(kDevice);
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      widest = at::autocast::promote_type(widest, kDevice, value.toTensor());
    } else if (value.isTensorList()) {
      widest = at::autocast::promote_type(widest, kDevice, value.toTensorVector());
    }
  }
  cast_arguments(op, stack, widest);
}

std::string overload(const char* name, const char* of) { return std::string(name) + "." + of; }
std::string overload(const char* name) { return name; }

#define NAMES_1(op) overload(#op)
#define NAMES_2(op, of) overload(#op, #of)
#define PICK(_1, _2, which, ...) which
#define NAME(...) PICK(__VA_ARGS__, NAMES_2, NAMES_1, )(__VA_ARGS__)
#define IN_LOWER(...) \
  m.impl(NAME(__VA_ARGS__).c_str(), torch::CppFunction::makeFromBoxedFunction<&in_lower_precision>());
#define IN_SINGLE(...) \
  m.impl(NAME(__VA_ARGS__).c_str(), torch::CppFunction::makeFromBoxedFunction<&in_single_precision>());
#define IN_WIDEST(...) \
  m.impl(NAME(__VA_ARGS__).c_str(), torch::CppFunction::makeFromBoxedFunction<&in_widest_precision>());

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(IN_LOWER)
  AT_FORALL_FP32(IN_SINGLE)
  AT_FORALL_FP32_SET_OPT_DTYPE(IN_SINGLE)
  AT_FORALL_PROMOTE(IN_WIDEST)
}

// ---- For Python ------------------------------------------------------------------------------------

TORCH_LIBRARY(testdevice, m) {
  m.def("default_generator() -> Generator?", [] { return default_generator(); });
}

// Gives all operators that have a kernel for one key the fallback as their kernel for another.
void run_on_cpu_what_has(c10::DispatchKey kernel, torch::Library& library) {
  for (const auto& op : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(kernel)) {
    if (op.name.rfind("aten::", 0) == 0 && op.name != "aten::_copy_from") {
      const auto name = op.overload_name.empty() ? op.name : op.name + "." + op.overload_name;
      library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    }
  }
}

[[maybe_unused]] const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  static torch::Library dense(
      torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static torch::Library sparse(
      torch::Library::IMPL, "aten", c10::DispatchKey::SparsePrivateUse1, __FILE__, __LINE__);
  // PyTorch would run these as their variants with `out`, which costs a second dispatch and, for
  // some, a warning about the shape of the output.
  run_on_cpu_what_has(c10::DispatchKey::CompositeExplicitAutogradNonFunctional, dense);
  // For some of these there is a kernel for all devices, which raises.
  run_on_cpu_what_has(c10::DispatchKey::SparseCPU, sparse);
  return true;
}();

} // namespace
