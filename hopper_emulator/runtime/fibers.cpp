#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <numeric>
#include <random>

#include "parts.h"

namespace emu {

Launch launch;
Index block_index;
Schedule schedule;
bool check_order;
Knowledge* knowledge;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  Condition* condition;
  Site site;
  Knowledge known;
  bool started, done;
};

Fiber fibers[MAX_THREADS];
char* stacks;
int running;
bool in_fiber;
jmp_buf scheduler, home;  // where a fiber comes back to, and where a failure outside of any fiber does
const std::function<void()>* body;
std::deque<std::function<void()>> pending;
std::mt19937 random_bits;
char message[4096];

// ucontext gives a fiber its stack, once; from then on longjmp switches, since swapcontext makes a system call each time
void first_step() {
  (*body)();
  fibers[running].done = true;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  running = thread;
  Fiber& fiber = fibers[thread];
  knowledge = &fiber.known;
  if (_setjmp(scheduler)) {
    in_fiber = false;
    return;
  }
  in_fiber = true;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void leave() {
  if (!_setjmp(fibers[running].resume)) _longjmp(scheduler, 1);
}

bool runnable(Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.condition && !fiber.condition->ready()) return false;
  fiber.condition = nullptr;
  return true;
}

// The oldest pending operation; in a seeded schedule any of them
void complete_one() {
  size_t which = schedule == Schedule::seeded ? random_below(pending.size()) : 0;
  std::function<void()> run = std::move(pending[which]);
  pending.erase(pending.begin() + which);
  run();
}

// Threads that wait for the same thing in the same place, as one line of the report
void report_deadlock(int threads) {
  std::map<std::string, std::pair<int, int>> waiting;
  const char* kind = "deadlock";
  for (int t = 0; t < threads; t++) {
    if (fibers[t].done) continue;
    if (fibers[t].condition->kind() != std::string("deadlock")) kind = fibers[t].condition->kind();
    char site[32];
    snprintf(site, sizeof site, " at {%p}", fibers[t].site);
    auto [at, fresh] = waiting.try_emplace(fibers[t].condition->text() + site, t, 0);
    at->second.second++;
  }
  std::string text;
  for (auto& [what, who] : waiting) {
    text += "\n  thread " + std::to_string(who.first);
    if (who.second > 1) text += " and " + std::to_string(who.second - 1) + " more";
    text += " " + what;
  }
  report(kind, "nothing can go on:%s", text.c_str());
}

bool round(std::vector<int>& warps, int threads) {
  bool ran = false;
  if (schedule == Schedule::seeded) std::shuffle(warps.begin(), warps.end(), random_bits);
  for (int warp : warps) {
    int first_lane = schedule == Schedule::seeded ? random_below(WARP) : 0;
    for (int i = 0; i < WARP; i++) {
      int t = warp * WARP + (first_lane + i) % WARP;
      if (t >= threads || !runnable(fibers[t])) continue;
      resume(t);
      ran = true;
      if (failed()) return true;
    }
    while (schedule == Schedule::seeded && !pending.empty() && random_below(4) == 0) {
      complete_one();
      ran = true;
    }
  }
  return ran;
}

void start(int threads, size_t agents) {
  if (!stacks) {
    void* memory = mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) perror("hopper_emulator: mmap"), abort();
    stacks = static_cast<char*>(memory);
  }
  for (int t = 0; t < threads; t++) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + STACK * t;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, first_step, 0);
    fiber.started = fiber.done = false;
    fiber.condition = nullptr;
    fiber.known.reset(agents);
    fiber.known.seen.counts[t] = 1;
  }
}

}  // namespace

int current() { return running; }
Knowledge& knowledge_of(int thread) { return fibers[thread].known; }
uint32_t now() { return knowledge->seen.counts[running]; }
void tick() { knowledge->seen.counts[running]++; }
uint32_t random_below(uint32_t n) { return random_bits() % n; }
void seed_schedule(uint32_t seed) { random_bits.seed(seed); }
bool on_stack(const void* address) { return size_t(static_cast<const char*>(address) - (stacks + STACK * running)) < STACK; }

void block(Condition& condition, Site site) {
  if (condition.ready()) return;
  fibers[running].condition = &condition;
  fibers[running].site = site;
  leave();
}

void preempt() {
  if (schedule == Schedule::seeded && random_below(64) == 0) leave();
}

void enqueue(std::function<void()> run) {
  if (schedule == Schedule::eager)
    run();
  else
    pending.push_back(std::move(run));
}

bool failed() { return message[0] != 0; }
const char* failure() { return message; }
void clear_failure() { message[0] = 0; }

void report(const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = snprintf(message, sizeof message, "%s|block (%u, %u, %u): ", kind, block_index.x, block_index.y, block_index.z);
  vsnprintf(message + n, sizeof message - n, format, arguments);
  va_end(arguments);
}

void fail(const char* kind, Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Index b = block_index;
  int n = snprintf(message, sizeof message, "%s|block (%u, %u, %u), thread %d at {%p}: ", kind, b.x, b.y, b.z, running, site);
  vsnprintf(message + n, sizeof message - n, format, arguments);
  va_end(arguments);
  _longjmp(in_fiber ? scheduler : home, 1);
}

bool run_block(Index index, const std::function<void()>& thread_body) {
  int threads = launch.block.x * launch.block.y * launch.block.z;
  size_t agents = first_storer(threads) + MAX_STORERS;
  block_index = index;
  body = &thread_body;
  pending.clear();
  reset_shared();
  reset_barriers(threads, agents);
  reset_copies();
  reset_products(threads);
  start(threads, agents);

  std::vector<int> warps((threads + WARP - 1) / WARP);
  std::iota(warps.begin(), warps.end(), 0);
  auto finished = [&] { return std::all_of(fibers, fibers + threads, [](Fiber& f) { return f.done; }); };
  if (_setjmp(home)) return false;
  while (!finished()) {
    if (round(warps, threads)) {
      if (failed()) return false;
    } else if (!pending.empty()) {
      complete_one();
    } else {
      report_deadlock(threads);
      return false;
    }
  }
  while (!pending.empty()) complete_one();
  check_copies_at_exit(threads);
  check_products_at_exit(threads);
  return true;
}

}  // namespace emu
