// A stack and a place to go on from. `go` leaves the running fibre and resumes another.
#pragma once

#if defined(__x86_64__)

#include <cstdint>

namespace emulator {

// Saves what the System V calling convention says a function must preserve. (Rounding modes are never changed.)
extern "C" void psyche_switch(void** leaving, void* entering);
__asm__(
    ".text\n.globl psyche_switch\n.hidden psyche_switch\n.type psyche_switch,@function\n"
    "psyche_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size psyche_switch,.-psyche_switch\n");

class Fibre {
 public:
  void start(char* stack, std::size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~static_cast<std::uintptr_t>(15);
    auto* words = reinterpret_cast<void**>(top);
    *--words = nullptr;  // where the entry would return to: it never does
    *--words = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
    at_ = words;
  }
  static void go(Fibre& from, Fibre& to) { psyche_switch(&from.at_, to.at_); }

 private:
  void* at_ = nullptr;
};

}  // namespace emulator

#else  // slower, because each switch is a system call, but the same everywhere

#include <ucontext.h>

#include <cstddef>

namespace emulator {

class Fibre {
 public:
  void start(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void go(Fibre& from, Fibre& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

}  // namespace emulator

#endif
