// Shared memory with a memory: who wrote each cell last and who has read it since, so that an access that is not ordered after an earlier
// one by barriers and waits is found in every schedule, also in those where it does no harm.
#include <cstring>
#include <unordered_map>

#include "parts.h"

// Dynamic shared memory under the name that TileLang gives it. The kernel's static __shared__ variables share the section
__attribute__((section("emu_shared"), aligned(1024))) unsigned char buf_dyn_shmem[emu::SHARED_LIMIT];
extern "C" unsigned char __start_emu_shared[], __stop_emu_shared[];

namespace emu {
namespace {

constexpr size_t CELL = 2;  // bytes; two threads may own neighbouring 16-bit elements, but no smaller ones
constexpr int FEW = 3;
constexpr size_t STATIC_LIMIT = 16384;

struct Event {
  uint32_t count;
  Agent agent;
  uint16_t unused;
  Site site;
};

struct Cell {
  Event write;
  Event reads[FEW];  // since the write; more of them, as where a whole warpgroup reads, go to `crowds`
  uint8_t n_reads;
  Kind kind;
  bool crowded;
};

Cell cells[(SHARED_LIMIT + STATIC_LIMIT) / CELL];
std::unordered_map<size_t, std::vector<Event>> crowds;

std::string agent_text(Agent agent) {
  int threads = block_threads();
  if (agent < threads) return "thread " + std::to_string(agent);
  if (agent >= first_storer(threads)) return "a TMA store";
  if (agent >= warpgroup_agent(threads, 0)) return "a wgmma of warpgroup " + std::to_string(agent - warpgroup_agent(threads, 0));
  return "a TMA load";
}

bool record_read(Event* events, int n, const Event& event) {
  for (int i = 0; i < n; i++)
    if (events[i].agent == event.agent) {
      events[i] = event;
      return true;
    }
  return false;
}

void add_read(size_t index, const Event& event) {
  Cell& cell = cells[index];
  if (record_read(cell.reads, cell.n_reads, event)) return;
  if (cell.n_reads < FEW) {
    cell.reads[cell.n_reads++] = event;
    return;
  }
  cell.crowded = true;
  std::vector<Event>& crowd = crowds[index];
  if (!record_read(crowd.data(), crowd.size(), event)) crowd.push_back(event);
}

void clear_reads(size_t index) {
  cells[index].n_reads = 0;
  if (!cells[index].crowded) return;
  crowds.erase(index);
  cells[index].crowded = false;
}

std::string write_text(const Cell& cell) {
  if (cell.kind == Kind::tma) return "the TMA load";
  return (cell.kind == Kind::copy ? "the cp.async of " : "the write by ") + agent_text(cell.write.agent);
}

void check_written(size_t index, const Clock& seen, Site site, const char* what) {
  const Cell& cell = cells[index];
  if (cell.kind == Kind::nothing) fail("unwritten", site, "%s reads {shared+%zu}, which nobody wrote", what, index * CELL);
  if (!check_order || seen.knows(cell.write.agent, cell.write.count)) return;
  const char* kind = cell.kind == Kind::ordinary ? "race" : "unwaited";
  fail(kind, site, "%s reads {shared+%zu}, but no barrier or wait orders it after %s at {%p}", what, index * CELL, write_text(cell).c_str(),
       cell.write.site);
}

void check_read_is_over(size_t index, const Event& read, const Clock& seen, Site site, const char* what) {
  if (seen.knows(read.agent, read.count)) return;
  const char* kind = read.agent >= first_storer(block_threads()) ? "store source" : read.agent < block_threads() ? "race" : "overwrite";
  fail(kind, site, "%s overwrites {shared+%zu}, but no barrier or wait orders it after the read by %s at {%p}", what, index * CELL,
       agent_text(read.agent).c_str(), read.site);
}

// A write must come after the write before it and after all reads of that
void check_overwrite(size_t index, const Clock& seen, Site site, const char* what) {
  const Cell& cell = cells[index];
  if (!check_order) return;
  if (cell.kind != Kind::nothing && !seen.knows(cell.write.agent, cell.write.count))
    fail(cell.kind == Kind::ordinary ? "race" : "overwrite", site,
         "%s overwrites {shared+%zu}, but no barrier or wait orders it after %s at {%p}", what, index * CELL, write_text(cell).c_str(),
         cell.write.site);
  for (int i = 0; i < cell.n_reads; i++) check_read_is_over(index, cell.reads[i], seen, site, what);
  if (cell.crowded)
    for (const Event& read : crowds[index]) check_read_is_over(index, read, seen, site, what);
}

void check_fenced(size_t index, const Clock& fenced, Site site, const char* what) {
  const Cell& cell = cells[index];
  if (!check_order || cell.kind != Kind::ordinary || fenced.knows(cell.write.agent, cell.write.count)) return;
  fail("proxy fence", site,
       "%s is asynchronous and touches {shared+%zu}, but no fence.proxy.async lies between it and the ordinary write by %s at {%p}", what,
       index * CELL, agent_text(cell.write.agent).c_str(), cell.write.site);
}

void check_extent(size_t at, size_t bytes, Site site) {
  if (at < SHARED_LIMIT && at + bytes > launch.shared_bytes)
    fail("out of bounds", site, "an access to {shared+%zu}, beyond the %zu bytes that the launch asks for", at, launch.shared_bytes);
}

}  // namespace

size_t shared_offset(const void* address) {
  size_t at = static_cast<const unsigned char*>(address) - buf_dyn_shmem;
  size_t before = buf_dyn_shmem - __start_emu_shared, all = __stop_emu_shared - __start_emu_shared;
  if (at < SHARED_LIMIT) return at;
  // Static variables before the dynamic buffer count as if they came after it
  size_t place = static_cast<const unsigned char*>(address) - __start_emu_shared;
  return place < before ? SHARED_LIMIT + place : place < all ? place : SIZE_MAX;
}

unsigned char* shared_at(size_t at) { return buf_dyn_shmem + at; }

void reset_shared() {
  memset(buf_dyn_shmem, 0xff, SHARED_LIMIT);  // NaN in every format
  memset(static_cast<void*>(cells), 0, sizeof cells);
  crowds.clear();
}

void ordinary_read(size_t at, size_t bytes, Site site) {
  check_extent(at, bytes, site);
  Event event{now(), Agent(current()), 0, site};
  for (size_t i = at / CELL; i * CELL < at + bytes; i++) {
    check_written(i, knowledge->seen, site, "an ordinary instruction");
    add_read(i, event);
  }
}

void ordinary_write(size_t at, size_t bytes, Site site) {
  check_extent(at, bytes, site);
  if (bytes < CELL || at % CELL) fail("unknown", site, "a write of %zu bytes at {shared+%zu}: the emulator keeps 16-bit cells", bytes, at);
  for (size_t i = at / CELL; i * CELL < at + bytes; i++) {
    check_overwrite(i, knowledge->seen, site, "an ordinary instruction");
    clear_reads(i);
    cells[i].write = {now(), Agent(current()), 0, site};
    cells[i].kind = Kind::ordinary;
  }
}

void async_read(size_t at, size_t bytes, const Knowledge& known, Agent reader, uint32_t count, Site site, const char* what) {
  check_extent(at, bytes, site);
  for (size_t i = at / CELL; i * CELL < at + bytes; i++) {
    check_written(i, known.seen, site, what);
    check_fenced(i, known.fenced, site, what);
    add_read(i, {count, reader, 0, site});
  }
}

void async_write_begins(size_t at, size_t bytes, Agent writer, Kind kind, Site site) {
  const char* what = kind == Kind::tma ? "a TMA load" : "a cp.async";
  check_extent(at, bytes, site);
  for (size_t i = at / CELL; i * CELL < at + bytes; i++) {
    check_overwrite(i, knowledge->seen, site, what);
    if (kind == Kind::tma) check_fenced(i, knowledge->fenced, site, what);
    clear_reads(i);
    cells[i].write = {NEVER, writer, 0, site};
    cells[i].kind = kind;
  }
}

void async_write_ends(size_t at, size_t bytes, uint32_t count) {
  for (size_t i = at / CELL; i * CELL < at + bytes; i++) cells[i].write.count = count;
}

}  // namespace emu
