// Asynchronous copies: TMA loads, stores and adding stores, and cp.async.
#include <cstring>
#include <map>

#include "kernel_calls.h"
#include "parts.h"
#include "tensor_map.h"

namespace emu {
namespace {

struct Load {
  TensorMap map;
  int barrier;
  size_t shared;
  int64_t at[5];
  Site site;
  uint32_t counted;  // the phase of its barrier that it completed with; 0 while it is in flight
};

struct Store {
  TensorMap map;
  size_t shared;
  int64_t at[5];
  bool add;
  Site site;
};

// One thread's groups of stores: committed ones are numbered from 1
struct Storer {
  Agent agent;
  std::vector<Store> open;
  uint32_t committed, waited;
  std::vector<bool> done;
};

struct Copy {
  size_t shared;
  const char* global;  // null: zeros
  int bytes;
};

struct Copier {
  std::vector<Copy> open;
  std::vector<bool> done;
  std::vector<std::vector<Copy>> groups;
  uint32_t waited;
};

std::vector<Load*> loads;
std::map<int, Storer> storers;
std::map<int, Copier> copiers;

void land(Load& load) {
  int bytes = 0;
  each_piece(load.map, load.shared, load.at, [&](uint32_t to, const char* from, int size) {
    unsigned char* place = shared_at(to);
    if (from)
      memcpy(place, from, size);
    else
      memset(place, load.map.fill_nan ? 0xff : 0, size);
    bytes += size;
  });
  load.counted = bytes_landed(load.barrier, bytes);
  each_piece(load.map, load.shared, load.at, [&](uint32_t to, const char*, int size) { async_write_ends(to, size, load.counted); });
}

void add_floats(char* to, const unsigned char* from, int bytes) {
  for (int i = 0; i < bytes; i += 4) {
    float sum, term;
    memcpy(&sum, to + i, 4), memcpy(&term, from + i, 4);
    sum += term;
    memcpy(to + i, &sum, 4);
  }
}

void carry_out(const Store& store) {
  each_piece(store.map, store.shared, store.at, [&](uint32_t from, char* to, int bytes) {
    if (!to) return;
    if (store.add)
      add_floats(to, shared_at(from), bytes);
    else
      memcpy(to, shared_at(from), bytes);
  });
}

Storer& storer(Site site) {
  auto [at, fresh] = storers.try_emplace(current());
  if (fresh) {
    if (storers.size() > MAX_STORERS) fail("unknown", site, "more than %d threads store by TMA", MAX_STORERS);
    at->second.agent = first_storer(block_threads()) + storers.size() - 1;
  }
  return at->second;
}

const TensorMap& checked(const void* opaque, size_t shared, int rank, Site site) {
  const TensorMap& map = *static_cast<const TensorMap*>(opaque);
  if (rank != map.rank) fail("tma", site, "%d coordinates for a tensor map of %d dimensions", rank, map.rank);
  if (shared == SIZE_MAX) fail("tma", site, "the address on the block's side is not in shared memory");
  if (shared % 128) fail("tma", site, "{shared+%zu} is not a multiple of 128 bytes", shared);
  return map;
}

// A row of bytes that no tensor map describes, as a tensor of one dimension; its place in shared memory need not be a multiple of 128
TensorMap plain_row(const void* global, size_t shared, uint32_t bytes, Site site) {
  if (shared == SIZE_MAX) fail("tma", site, "the address on the block's side is not in shared memory");
  if (shared % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fail("tma", site, "a bulk copy of %u bytes from or to {shared+%zu}: addresses and size must be multiples of 16", bytes, shared);
  TensorMap map{};
  map.base = static_cast<char*>(const_cast<void*>(global));
  map.rank = 1, map.element = 4, map.sizes[0] = map.box[0] = bytes / 4;
  return map;
}
const int64_t ROW_START[] = {0};

void begin_load(const TensorMap& map, const void* barrier, size_t place, const int64_t* at, Site site) {
  int b = barrier_of(barrier, site);
  if (!fenced_init(b)) fail("proxy fence", site, "{barrier %p} counts a TMA load, but no fence follows its initialisation", barrier);
  Load* load = new Load{map, b, place, {}, site, 0};
  memcpy(load->at, at, map.rank * sizeof *at);
  loads.push_back(load);
  each_piece(map, place, at, [&](uint32_t to, const char* from, int bytes) {
    async_write_begins(to, bytes, agent_of(b), Kind::tma, site);
    if (from) check_global(from, bytes, site, "a TMA load");
  });
  enqueue([load] { land(*load); });
}

void begin_store(const TensorMap& map, size_t place, const int64_t* at, bool add, Site site) {
  if (add && map.element != 4) fail("unknown", site, "a TMA store that adds elements of %d bytes: only float32 is known", map.element);
  Storer& mine = storer(site);
  Store store{map, place, {}, add, site};
  memcpy(store.at, at, map.rank * sizeof *at);
  each_piece(map, place, at, [&](uint32_t from, const char* to, int bytes) {
    if (!to) return;
    async_read(from, bytes, *knowledge, mine.agent, mine.committed + 1, site, "a TMA store");
    check_global(to, bytes, site, "a TMA store");
  });
  mine.open.push_back(store);
}

struct GroupsDone : Condition {
  std::vector<bool>& done;
  uint32_t first, until;
  const char* what;
  GroupsDone(std::vector<bool>& done, uint32_t first, uint32_t until, const char* what)
      : done(done), first(first), until(until), what(what) {}
  bool ready() override {
    for (uint32_t g = first; g < until; g++)
      if (!done[g]) return false;
    return true;
  }
  std::string text() override { return std::string("waits for its ") + what; }
};

uint32_t all_but(size_t committed, int but) { return committed > size_t(but) ? committed - but : 0; }

}  // namespace

void reset_copies() {
  for (Load* load : loads) delete load;
  loads.clear();
  storers.clear();
  copiers.clear();
}

void tma_load(const void* opaque, const void* barrier, void* shared, const int64_t* at, int rank) {
  Site site = EMU_SITE;
  size_t place = shared_offset(shared);
  begin_load(checked(opaque, place, rank, site), barrier, place, at, site);
}

void tma_store(const void* opaque, const void* shared, const int64_t* at, int rank, bool add) {
  Site site = EMU_SITE;
  size_t place = shared_offset(shared);
  begin_store(checked(opaque, place, rank, site), place, at, add, site);
}

void bulk_load(void* shared, const void* global, const void* barrier, uint32_t bytes) {
  Site site = EMU_SITE;
  size_t place = shared_offset(shared);
  begin_load(plain_row(global, place, bytes, site), barrier, place, ROW_START, site);
}

void bulk_store(void* global, const void* shared, uint32_t bytes, bool add) {
  Site site = EMU_SITE;
  size_t place = shared_offset(shared);
  begin_store(plain_row(global, place, bytes, site), place, ROW_START, add, site);
}

void tma_store_commit() {
  Site site = EMU_SITE;
  Storer& mine = storer(site);
  uint32_t group = mine.committed++;
  mine.done.push_back(false);
  std::vector<Store> stores = std::move(mine.open);
  mine.open.clear();
  enqueue([&mine, group, stores] {
    for (const Store& store : stores) carry_out(store);
    mine.done[group] = true;
  });
}

void tma_store_wait(int but) {
  Site site = EMU_SITE;
  Storer& mine = storer(site);
  uint32_t until = all_but(mine.committed, but);
  GroupsDone done(mine.done, mine.waited, until, "TMA stores");
  block(done, site);
  mine.waited = std::max(mine.waited, until);
  uint32_t& known = knowledge->seen.counts[mine.agent];
  known = std::max(known, mine.waited);
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  Site site = EMU_SITE;
  size_t place = shared_offset(shared);
  if (place == SIZE_MAX || place % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("tma", site, "cp.async of %d bytes: an address is misaligned or not shared", bytes);
  async_write_begins(place, bytes, current(), Kind::copy, site);
  if (valid) check_global(global, bytes, site, "a cp.async");
  copiers[current()].open.push_back({place, valid ? static_cast<const char*>(global) : nullptr, bytes});
}

void copy_commit() {
  Copier& mine = copiers[current()];
  size_t group = mine.groups.size();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
  mine.done.push_back(false);
  enqueue([&mine, group] {
    for (const Copy& copy : mine.groups[group]) {
      if (copy.global)
        memcpy(shared_at(copy.shared), copy.global, copy.bytes);
      else
        memset(shared_at(copy.shared), 0, copy.bytes);
    }
    mine.done[group] = true;
  });
}

void copy_wait(int but) {
  Site site = EMU_SITE;
  Copier& mine = copiers[current()];
  uint32_t until = all_but(mine.groups.size(), but);
  GroupsDone done(mine.done, mine.waited, until, "cp.asyncs");
  block(done, site);
  // From now on it is as if this thread had written it
  for (; mine.waited < until; mine.waited++)
    for (const Copy& copy : mine.groups[mine.waited]) async_write_ends(copy.shared, copy.bytes, now());
}

void check_copies_at_exit(int threads) {
  for (Load* load : loads) {
    bool waited = false;
    for (int t = 0; t < threads && !waited; t++) waited = knowledge_of(t).seen.knows(agent_of(load->barrier), load->counted);
    if (!waited) fail("unwaited", load->site, "the block ends and nobody has waited for this TMA load");
  }
  for (auto& [thread, mine] : storers) {
    if (!mine.open.empty()) fail("unwaited", mine.open[0].site, "thread %d never commits this TMA store", thread);
    if (mine.waited < mine.committed)
      fail("store source", nullptr, "the block ends, but thread %d has not waited until its TMA stores have read their source", thread);
  }
  for (auto& [thread, mine] : copiers)
    if (!mine.open.empty() || mine.waited < mine.groups.size())
      fail("unwaited", nullptr, "the block ends and thread %d has not waited for its cp.async", thread);
}

}  // namespace emu
