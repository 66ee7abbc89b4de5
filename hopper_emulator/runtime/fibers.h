// The threads of a block as fibers of one CPU thread, and the schedules in which they and the asynchronous operations run.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "clock.h"

namespace emu {

using Site = const void*;  // where in the kernel's machine code: the return address of a call into the runtime
// Each function that a kernel calls takes its site itself, so it must be a real call, and its wrappers in kernel.h inlined
#define EMU_SITE (__builtin_return_address(0))

struct Index {
  unsigned x, y, z;
};
struct Launch {
  Index grid, block;
  size_t shared_bytes;
  int registers;
};

// Eager: an asynchronous operation is done when it is issued. Lazy: only when no thread can go on. Seeded: in random order, as the warps.
enum class Schedule { eager, lazy, seeded };

// What a thread waits for: asked again and again until it is there. The text is for the report of a deadlock.
struct Condition {
  virtual bool ready() = 0;
  virtual std::string text() = 0;
  virtual const char* kind() { return "deadlock"; }
};

extern Launch launch;
extern Index block_index;
extern Schedule schedule;
extern bool check_order;      // false: a race is not reported, it shows as a wrong value or not at all
extern Knowledge* knowledge;  // of the running thread

int current();  // the running thread
Knowledge& knowledge_of(int thread);
uint32_t now();  // the running thread's own count
void tick();     // ends an interval of the running thread: what it does next is not yet known to anybody
void block(Condition& condition, Site site);
void preempt();  // in a seeded schedule: perhaps let others run
uint32_t random_below(uint32_t n);

// Hands an operation to the schedule; `run` may be called now or later, once
void enqueue(std::function<void()> run);

// Ends the emulation with a report; {0x...} in the text is a site, {shared+n} a byte of shared memory
[[noreturn]] void fail(const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Runs one block; `thread_body` is the kernel with its arguments. False if it failed: then failure() has the report
bool run_block(Index index, const std::function<void()>& thread_body);
const char* failure();
void report(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));  // a failure outside of any thread
bool failed();

}  // namespace emu
