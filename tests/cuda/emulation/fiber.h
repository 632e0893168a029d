// A function on a stack of its own that can be left and entered again. swapcontext makes a system call each time, so
// x86-64 switches in a dozen instructions; AddressSanitizer is told of each switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __x86_64__
// Save the callee's registers on this stack, its pointer at *from, and go on where the stack `to` was left.
extern "C" void emulation_switch_stack(void** from, void* to);
__asm__(R"(
.text
.type emulation_switch_stack, @function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack, .-emulation_switch_stack
)");
#endif

class Fiber {
 public:
  Fiber() {
    page_ = size_t(sysconf(_SC_PAGESIZE));
    memory_ = static_cast<char*>(mmap(nullptr, kStack + page_, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_, page_, PROT_NONE)) std::abort(); // the page that an overflow meets
  }
  ~Fiber() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory_ + page_, kStack);
#endif
    munmap(memory_, kStack + page_);
  }
  Fiber(const Fiber&) = delete;

  // The next enter() begins `function`; when it returns the fiber is left for good.
  void start(void (*function)()) {
    function_ = function;
#ifdef __x86_64__
    uintptr_t* top = reinterpret_cast<uintptr_t*>(memory_ + page_ + kStack) - 1; // aligned as after a call
    *--top = reinterpret_cast<uintptr_t>(&Fiber::run);
    stack_ = top - 6; // six registers, whatever they hold
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_ + page_, context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::run, 0);
#endif
  }

  void enter() {
    entered = this;
    before_switch(&caller_fake_, memory_ + page_, kStack);
#ifdef __x86_64__
    emulation_switch_stack(&caller_, stack_);
#else
    swapcontext(&caller_, &context_);
#endif
    after_switch(caller_fake_, nullptr, nullptr);
  }

  void leave() {
    before_switch(&fake_, caller_bottom_, caller_size_);
#ifdef __x86_64__
    emulation_switch_stack(&stack_, caller_);
#else
    swapcontext(&context_, &caller_);
#endif
    after_switch(fake_, &caller_bottom_, &caller_size_);
  }

 private:
  static constexpr size_t kStack = 256 * 1024;
  static inline Fiber* entered = nullptr;

  static void run() {
    Fiber* const self = entered;
    self->after_switch(nullptr, &self->caller_bottom_, &self->caller_size_);
    self->function_();
    self->leave();
    std::abort(); // a fiber that has ended was entered
  }

  void before_switch(void** fake, const void* bottom, size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake, bottom, size);
#else
    (void)fake, (void)bottom, (void)size;
#endif
  }
  void after_switch(void* fake, const void** bottom, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#else
    (void)fake, (void)bottom, (void)size;
#endif
  }

  char* memory_;
  size_t page_;
  void (*function_)() = nullptr;
#ifdef __x86_64__
  void *stack_ = nullptr, *caller_ = nullptr;
#else
  ucontext_t context_, caller_;
#endif
  void *fake_ = nullptr, *caller_fake_ = nullptr;
  const void* caller_bottom_ = nullptr;
  size_t caller_size_ = 0;
};
