// Runs n functions together that wait for each other. As fibres: ring order, a switch only where one waits.
#pragma once

#include <functional>
#include <vector>

#ifdef MFD_EMULATOR_THREADS

#include <condition_variable>
#include <mutex>
#include <thread>

namespace mfd_emulator {

class Runner {
 public:
  void run(unsigned n, const std::function<void(unsigned)>& task) {
    std::vector<std::thread> threads;
    for (unsigned k = 0; k < n; ++k) threads.emplace_back(task, k);
    for (std::thread& thread : threads) thread.join();
  }
  void wait() {  // the lock is held
    std::unique_lock<std::mutex> lock(mutex_, std::adopt_lock);
    changed_.wait(lock);
    lock.release();
  }
  void wake_all() { changed_.notify_all(); }
  std::mutex mutex_;

 private:
  std::condition_variable changed_;
};

struct Lock : std::lock_guard<std::mutex> {
  explicit Lock(Runner& runner) : std::lock_guard<std::mutex>(runner.mutex_) {}
};

}  // namespace mfd_emulator

#else

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace mfd_emulator {

class Runner {
 public:
  void run(unsigned n, const std::function<void(unsigned)>& task) {
    task_ = &task;
    while (fibres_.size() < n) add();
    n_ = left_ = n;
    for (unsigned k = 0; k < n; ++k) fibres_[k].done = false;
    at_ = 0;
    find_own_stack();
    to(main_, fibres_[0]);
  }
  void wait() { to_next(); }
  void wake_all() {}

 private:
  struct Fibre {
    ucontext_t context;
    jmp_buf registers;
    void* stack;
    size_t stack_bytes;
    bool started = true, done = true;
  };

  void add() {
    Fibre& fibre = fibres_.emplace_back();
    fibre.stack_bytes = kStack;
    fibre.stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fibre.stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(fibre.stack, 4096, PROT_NONE);  // an overflow stops here
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    fibre.started = false;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fibre.context, reinterpret_cast<void (*)()>(&Runner::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }

  static void enter(unsigned high, unsigned low) {
    arrived(nullptr);
    reinterpret_cast<Runner*>(static_cast<uintptr_t>(high) << 32 | low)->loop();
  }

  // A fibre lives on for the next block.
  void loop() {
    for (;;) {
      const unsigned mine = at_;
      (*task_)(mine);
      fibres_[mine].done = true;
      if (--left_ == 0) {
        to(fibres_[mine], main_);
      } else {
        to_next();
      }
    }
  }

  void to_next() {
    Fibre& from = fibres_[at_];
    do at_ = at_ + 1 == n_ ? 0 : at_ + 1;
    while (fibres_[at_].done);
    if (&fibres_[at_] != &from) to(from, fibres_[at_]);
  }

#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 512 << 10;
  void find_own_stack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &main_.stack, &main_.stack_bytes);
    pthread_attr_destroy(&attributes);
  }
  void to(Fibre& from, Fibre& next) {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, next.stack, next.stack_bytes);
    libc_swapcontext()(&from.context, &next.context);
    arrived(fake);
  }
  // AddressSanitizer's own clears the shadow of the whole stack at every switch.
  static decltype(&swapcontext) libc_swapcontext() {
    static const auto found =
        reinterpret_cast<decltype(&swapcontext)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
    return found;
  }
  static void arrived(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
#else
  static constexpr size_t kStack = 128 << 10;
  void find_own_stack() {}
  // setcontext enters a fibre the first time; later switches need no system call.
  void to(Fibre& from, Fibre& next) {
    if (_setjmp(from.registers)) return;
    if (next.started) _longjmp(next.registers, 1);
    next.started = true;
    setcontext(&next.context);
  }
  static void arrived(void*) {}
#endif

  std::deque<Fibre> fibres_;  // a context must not move
  Fibre main_;
  const std::function<void(unsigned)>* task_ = nullptr;
  unsigned n_ = 0, left_ = 0, at_ = 0;
};

struct Lock {
  explicit Lock(Runner&) {}
};

}  // namespace mfd_emulator

#endif
