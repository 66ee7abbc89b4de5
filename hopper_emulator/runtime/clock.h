// Happens-before, kept as vector clocks. Whoever acts in a thread block is an agent: each thread, each mbarrier (for the TMA loads that it
// counts), each warpgroup (for its wgmma products) and each thread that issues TMA stores (for those). An event is an agent and that
// agent's count at the time; a thread's clock says, for each agent, up to which count it is ordered after what that agent did.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace emu {

constexpr int MAX_THREADS = 1024, MAX_BARRIERS = 64, MAX_WARPGROUPS = MAX_THREADS / 128, MAX_STORERS = 56;
constexpr uint32_t NEVER = UINT32_MAX;  // the count of an event that has not happened yet

using Agent = uint16_t;

struct Clock {
  std::vector<uint32_t> counts;

  void reset(size_t agents) { counts.assign(agents, 0); }
  void fill(uint32_t count) { std::fill(counts.begin(), counts.end(), count); }
  bool knows(Agent agent, uint32_t count) const { return counts[agent] >= count; }

  void join(const Clock& other) {
    uint32_t* mine = counts.data();
    const uint32_t* theirs = other.counts.data();
    for (size_t i = 0, n = counts.size(); i < n; i++) mine[i] = std::max(mine[i], theirs[i]);
  }
  void meet(const Clock& other) {
    uint32_t* mine = counts.data();
    const uint32_t* theirs = other.counts.data();
    for (size_t i = 0, n = counts.size(); i < n; i++) mine[i] = std::min(mine[i], theirs[i]);
  }
};

// What is known, and what of it is fenced: ordered before some fence.proxy.async, so that the async proxy sees it too.
struct Knowledge {
  Clock seen, fenced;

  void reset(size_t agents) { seen.reset(agents), fenced.reset(agents); }
  void join(const Knowledge& other) { seen.join(other.seen), fenced.join(other.fenced); }
  void meet(const Knowledge& other) { seen.meet(other.seen), fenced.meet(other.fenced); }
};

}  // namespace emu
