// Kernels by name.
#pragma once

#include <cstddef>
#include <utility>

namespace emulator {

struct Kernel {
  const char* name;
  int arguments;
  void (*invoke)(void** arguments);
};

const Kernel* kernel_named(const char* name);

template <auto KERNEL>
struct Invoked;
template <typename... Arguments, void (*KERNEL)(Arguments...)>
struct Invoked<KERNEL> {
  static constexpr int COUNT = sizeof...(Arguments);
  static void with(void** arguments) { spread(arguments, std::index_sequence_for<Arguments...>{}); }

 private:
  template <std::size_t... I>
  static void spread(void** arguments, std::index_sequence<I...>) {
    KERNEL(*static_cast<Arguments*>(arguments[I])...);
  }
};

}  // namespace emulator
