// mbarriers, named barriers, and the exchanges of a warp: where threads come to know of one another.
#include <unordered_map>

#include "kernel_calls.h"
#include "parts.h"

namespace emu {
namespace {

// PTX ISA, "mbarrier": a phase is complete when as many arrivals are in as the barrier expects and all announced bytes have landed.
struct MBarrier {
  int expected, missing;
  int64_t bytes;       // announced and not landed yet
  uint32_t phase;      // phases completed
  Knowledge gathered;  // from those who arrived in this phase
  Knowledge released;  // of the phase completed last
  Agent initialiser;
  uint32_t initialised;
  bool fenced;
  const void* address;
};

// PTX ISA, "bar": complete when `threads` of them have come, to wait or only to arrive.
struct NamedBarrier {
  int threads, come;
  uint32_t generation;
  std::vector<bool> who;
  Knowledge gathered, released;
};

struct Warp {
  int come;
  uint32_t generation;
  uint64_t slots[2][32];
  Knowledge gathered, released;
};

MBarrier mbarriers[MAX_BARRIERS];
int n_mbarriers;
std::unordered_map<const void*, int> by_address;
NamedBarrier named[16];
Warp warps[MAX_THREADS / 32];
int64_t free_registers;
std::vector<int> warp_registers;

std::string barrier_text(const MBarrier& b) {
  char text[200];
  snprintf(text, sizeof text, "{barrier %p} (phase %u: %d of %d arrivals missing, %lld bytes not landed)", b.address, b.phase, b.missing,
           b.expected, static_cast<long long>(b.bytes));
  return text;
}

void maybe_complete(int i) {
  MBarrier& b = mbarriers[i];
  if (b.missing != 0 || b.bytes != 0) return;
  b.phase++;
  b.missing = b.expected;
  std::swap(b.released, b.gathered);
  b.gathered.reset(b.released.seen.counts.size());
  // Later phases know what earlier ones knew: a waiter that skips one misses nothing
  b.gathered.join(b.released);
  b.released.seen.counts[agent_of(i)] = b.phase;
  b.gathered.seen.counts[agent_of(i)] = b.phase;
}

void use(const MBarrier& b, Site site) {
  if (!knowledge->seen.knows(b.initialiser, b.initialised))
    fail("race", site, "{barrier %p} is used, but no barrier orders this after its initialisation by thread %d", b.address, b.initialiser);
}

void arrive(int i, Site site) {
  MBarrier& b = mbarriers[i];
  if (b.missing == 0) fail("over-arrival", site, "one arrival too many at %s", barrier_text(b).c_str());
  b.gathered.join(*knowledge);
  tick();
  b.missing--;
  maybe_complete(i);
}

struct PhaseDone : Condition {
  MBarrier& barrier;
  uint32_t parity;
  PhaseDone(MBarrier& barrier, uint32_t parity) : barrier(barrier), parity(parity) {}
  bool ready() override { return (barrier.phase & 1) != parity; }
  std::string text() override { return "waits for parity " + std::to_string(parity) + " of " + barrier_text(barrier); }
};

struct GenerationDone : Condition {
  int id;
  uint32_t generation;
  GenerationDone(int id) : id(id), generation(named[id].generation) {}
  bool ready() override { return named[id].generation != generation; }
  std::string text() override {
    return "waits at named barrier " + std::to_string(id) + " (" + std::to_string(named[id].come) + " of " +
           std::to_string(named[id].threads) + " threads came)";
  }
};

struct WarpDone : Condition {
  Warp& warp;
  uint32_t generation;
  WarpDone(Warp& warp) : warp(warp), generation(warp.generation) {}
  bool ready() override { return warp.generation != generation; }
  std::string text() override { return "waits for the other lanes of its warp (" + std::to_string(warp.come) + " of 32 came)"; }
};

struct RegistersFree : Condition {
  int64_t wanted;
  RegistersFree(int64_t wanted) : wanted(wanted) {}
  bool ready() override { return free_registers >= wanted; }
  std::string text() override {
    return "wants " + std::to_string(wanted) + " more registers for its warp (setmaxnreg); the pool has " + std::to_string(free_registers);
  }
  const char* kind() override { return "registers"; }
};

void come(int id, int threads, Site site) {
  NamedBarrier& b = named[id & 15];
  if (id < 0 || id > 15) fail("barrier", site, "named barrier %d: there are 16", id);
  if (threads % 32 || threads <= 0 || threads > block_threads())
    fail("barrier", site, "named barrier %d of %d threads in a block of %d", id, threads, block_threads());
  if (b.come == 0) b.threads = threads, b.who.assign(block_threads(), false);
  if (b.threads != threads) fail("barrier", site, "named barrier %d expects %d threads here and %d elsewhere", id, threads, b.threads);
  if (b.who[current()]) fail("over-arrival", site, "this thread comes to named barrier %d twice before the others come once", id);
  b.who[current()] = true;
  b.gathered.join(*knowledge);
  tick();
  if (++b.come < threads) return;
  b.come = 0;
  b.generation++;
  std::swap(b.released, b.gathered);
  b.gathered.reset(b.released.seen.counts.size());
}

// All lanes meet; with `order` they come to know what the others did, which a shuffle alone does not promise
void meet(bool order, Site site) {
  Warp& w = warps[current() / 32];
  WarpDone done(w);
  if (order) w.gathered.join(*knowledge), tick();
  if (++w.come == 32) {
    w.come = 0;
    w.generation++;
    if (order) std::swap(w.released, w.gathered), w.gathered.reset(w.released.seen.counts.size());
  }
  block(done, site);
  if (order) knowledge->join(w.released);
}

}  // namespace

void reset_barriers(int threads, size_t agents) {
  n_mbarriers = 0;
  by_address.clear();
  for (NamedBarrier& b : named) b.come = 0, b.generation = 0, b.gathered.reset(agents), b.released.reset(agents);
  for (int w = 0; w < (threads + 31) / 32; w++)
    warps[w].come = 0, warps[w].generation = 0, warps[w].gathered.reset(agents), warps[w].released.reset(agents);
  warp_registers.assign((threads + 31) / 32, launch.registers);
  free_registers = 0;
}

int barrier_of(const void* address, Site site) {
  auto found = by_address.find(address);
  if (found == by_address.end()) fail("unwritten", site, "{barrier %p} is used, but nobody initialised it", address);
  return found->second;
}

Agent agent_of(int barrier) { return barrier_agent(block_threads(), barrier); }
bool fenced_init(int barrier) { return mbarriers[barrier].fenced; }

uint32_t bytes_landed(int i, int bytes) {
  MBarrier& b = mbarriers[i];
  uint32_t count = b.phase + 1;
  b.bytes -= bytes;
  maybe_complete(i);
  return count;
}

void mbarrier_init(void* address, uint32_t count) {
  Site site = EMU_SITE;
  if (n_mbarriers == MAX_BARRIERS) fail("unknown", site, "more than %d mbarriers", MAX_BARRIERS);
  if (by_address.count(address)) fail("barrier", site, "{barrier %p} is initialised twice", address);
  by_address[address] = n_mbarriers;
  MBarrier& b = mbarriers[n_mbarriers++];
  b.expected = b.missing = count;
  b.bytes = b.phase = 0;
  b.gathered.reset(knowledge->seen.counts.size()), b.released.reset(knowledge->seen.counts.size());
  b.initialiser = current(), b.initialised = now(), b.fenced = false, b.address = address;
}

void mbarrier_wait(const void* address, uint32_t parity) {
  Site site = EMU_SITE;
  MBarrier& b = mbarriers[barrier_of(address, site)];
  use(b, site);
  PhaseDone done(b, parity & 1);
  block(done, site);
  knowledge->join(b.released);
}

void mbarrier_arrive(const void* address, uint32_t announced) {
  Site site = EMU_SITE;
  int i = barrier_of(address, site);
  use(mbarriers[i], site);
  mbarriers[i].bytes += announced;
  arrive(i, site);
}

void mbarrier_expect(const void* address, uint32_t bytes) {
  Site site = EMU_SITE;
  int i = barrier_of(address, site);
  use(mbarriers[i], site);
  mbarriers[i].bytes += bytes;
}

void fence_inits() {
  for (int i = 0; i < n_mbarriers; i++)
    if (mbarriers[i].initialiser == current()) mbarriers[i].fenced = true;
}

void proxy_fence() {
  knowledge->fenced.join(knowledge->seen);
  tick();
  fence_inits();
}

void named_sync(int id, int threads) {
  Site site = EMU_SITE;
  GenerationDone done(id & 15);
  come(id, threads, site);
  block(done, site);
  knowledge->join(named[id].released);
}

void named_arrive(int id, int threads) {
  Site site = EMU_SITE;
  come(id, threads, site);
}

uint64_t exchange(uint64_t value, int lane) {
  Site site = EMU_SITE;
  Warp& w = warps[current() / 32];
  uint64_t* slots = w.slots[w.generation & 1];
  slots[current() % 32] = value;
  meet(false, site);
  return slots[lane & 31];
}

void warp_sync() {
  Site site = EMU_SITE;
  meet(true, site);
}

void set_registers(int wanted, bool more) {
  Site site = EMU_SITE;
  int& has = warp_registers[current() / 32];
  if (wanted % 8 || wanted < 24 || wanted > 256)
    fail("registers", site, "setmaxnreg to %d: a multiple of 8 from 24 to 256 is needed", wanted);
  if (current() % 32 == 0) {
    if (more ? wanted < has : wanted > has)
      fail("registers", site, "setmaxnreg.%s to %d, but the warp has %d", more ? "inc" : "dec", wanted, has);
    RegistersFree enough(int64_t(32) * (wanted - has));
    block(enough, site);
    free_registers -= int64_t(32) * (wanted - has);
    has = wanted;
  }
  meet(false, site);
}

}  // namespace emu
