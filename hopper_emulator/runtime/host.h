// How a kernel makes itself known to the host side: EMULATED_KERNEL(name, blocks_per_sm, dynamic_shared) after its definition.
#pragma once
#include <tvm/ffi/c_api.h>

#include <functional>
#include <tuple>
#include <type_traits>

namespace emu {

struct KernelFacts {
  int blocks_per_sm;
  bool dynamic_shared;
};
using Caller = int (*)(const TVMFFIAny* arguments, std::function<void()>& body);
void add_kernel(const char* name, Caller call, const KernelFacts* facts);

template <class T>
T argument(const TVMFFIAny& value) {
  if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(value.v_ptr);
  else if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(value.v_float64);
  else if constexpr (std::is_integral_v<T>)
    return static_cast<T>(value.v_int64);
  else
    return *static_cast<const T*>(value.v_ptr);  // a tensor map, by value
}

// Binds the arguments of a launch to the kernel; returns how many there are
template <class... P, size_t... I>
int bind_arguments(void (*kernel)(P...), const TVMFFIAny* values, std::function<void()>& body, std::index_sequence<I...>) {
  std::tuple<std::decay_t<P>...> bound(argument<std::decay_t<P>>(values[I])...);
  body = [kernel, bound] { std::apply(kernel, bound); };
  return sizeof...(P);
}
template <class... P>
int bind(void (*kernel)(P...), const TVMFFIAny* values, std::function<void()>& body) {
  return bind_arguments(kernel, values, body, std::index_sequence_for<P...>());
}

}  // namespace emu

#define EMULATED_KERNEL(NAME, BLOCKS_PER_SM, DYNAMIC_SHARED)                                                             \
  static const emu::KernelFacts NAME##_facts{BLOCKS_PER_SM, DYNAMIC_SHARED};                                             \
  static int NAME##_call(const TVMFFIAny* values, std::function<void()>& body) { return emu::bind(NAME, values, body); } \
  [[gnu::constructor]] static void NAME##_add() { emu::add_kernel(#NAME, NAME##_call, &NAME##_facts); }
