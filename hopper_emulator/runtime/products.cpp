// wgmma: products of a warpgroup that run beside its threads.
#include <cstring>
#include <deque>

#include "kernel_calls.h"
#include "parts.h"
#include "tensor_map.h"

namespace emu {
namespace {

constexpr int GROUP = 128, M = 64, K = 16, MAX_N = 256;

struct Issued {
  Product product;
  Site site;
};

// Registers of a thread that belong to a wgmma until the thread has waited for its batch
struct Busy {
  const char *begin, *end;
  bool written;  // the accumulator; the operand A is only read
  uint32_t batch;
  Site site;
};

struct Warpgroup {
  std::vector<Busy> busy[GROUP];
  std::vector<Issued> open[GROUP];                 // issued, not committed, by thread
  std::deque<std::vector<Issued>> batches[GROUP];  // committed, not run
  uint32_t committed[GROUP];
  std::deque<Knowledge> known;  // what all threads knew when they committed a batch; its front is that of batch `first_known`
  std::deque<int> commits;
  uint32_t complete, run;  // batches that all threads committed; that have run
};

Warpgroup groups[MAX_WARPGROUPS];
float A[M * K], B[K * MAX_N], C[M * MAX_N];

float widen(uint16_t bits, Element element) {
  float value;
  if (element == Element::bfloat16) {
    uint32_t wide = uint32_t(bits) << 16;
    memcpy(&value, &wide, 4);
  } else {
    _Float16 half;
    memcpy(&half, &bits, 2);
    value = half;
  }
  return value;
}

// PTX ISA, "matrix descriptor": start, leading and stride byte offsets in 16-byte units, swizzle in the top two bits
struct Layout {
  uint32_t start, leading, stride, line;
  int mode;
  bool transposed;
  Layout(uint64_t descriptor, bool transposed) : transposed(transposed) {
    start = (descriptor & 0x3fff) << 4, leading = ((descriptor >> 16) & 0x3fff) << 4, stride = ((descriptor >> 32) & 0x3fff) << 4;
    int swizzle = descriptor >> 62;  // 1, 2, 3: 128, 64, 32 bytes
    line = 256 >> swizzle, mode = 4 - swizzle;
  }
  // Row r of M or N and column k, as byte offset of the element
  uint32_t at(int r, int k) const {
    uint32_t place;
    if (!transposed) {
      place = start + r / 8 * stride + r % 8 * line + k * 2;
    } else {
      int across = line / 2;
      place = start + r / across * leading + r % across * 2 + k % 8 * line + k / 8 * stride;
    }
    return swizzled(place, mode);
  }
  // Elements that follow each other in memory
  int run() const { return transposed ? std::min<int>(8, line / 2) : 8; }
};

template <class F>
void each_run(uint64_t descriptor, bool transposed, int rows, F visit) {
  Layout layout(descriptor, transposed);
  int run = layout.run();
  if (!transposed)
    for (int r = 0; r < rows; r++)
      for (int k = 0; k < K; k += run) visit(layout.at(r, k), r, k, run);
  else
    for (int k = 0; k < K; k++)
      for (int r = 0; r < rows; r += run) visit(layout.at(r, k), r, k, run);
}

void check_operand(uint64_t descriptor, bool transposed, int rows, const Knowledge& known, Agent agent, uint32_t count, Site site) {
  each_run(descriptor, transposed, rows,
           [&](uint32_t at, int, int, int run) { async_read(at, run * 2, known, agent, count, site, "a wgmma"); });
}

void gather(uint64_t descriptor, bool transposed, int rows, Element element, float* out, int row_step, int k_step) {
  each_run(descriptor, transposed, rows, [&](uint32_t at, int r, int k, int run) {
    uint16_t bits[8];
    memcpy(bits, shared_at(at), run * 2);
    for (int i = 0; i < run; i++) out[(transposed ? r + i : r) * row_step + (transposed ? k : k + i) * k_step] = widen(bits[i], element);
  });
}

// The accumulator layout: thread t, register i -> row and column
inline int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2); }
inline int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

void gather_registers(int t, const uint32_t* registers, Element element) {
  for (int i = 0; i < 8; i++) A[row_of(t, i) * K + column_of(t, i)] = widen(registers[i / 2] >> (16 * (i % 2)), element);
}

__attribute__((target_clones("avx2", "default"))) void multiply(int N) {
  for (int r = 0; r < M; r++)
    for (int k = 0; k < K; k++) {
      float a = A[r * K + k];
      const float* b = B + k * MAX_N;
      float* c = C + r * MAX_N;
      for (int n = 0; n < N; n++) c[n] += a * b[n];
    }
}

void run_one(Warpgroup& group, size_t i) {
  const Product& p = group.batches[0].front()[i].product;
  if (p.register_A)
    for (int t = 0; t < GROUP; t++) gather_registers(t, group.batches[t].front()[i].product.A_registers, p.element);
  else
    gather(p.A, p.transpose_A, M, p.element, A, K, 1);
  gather(p.B, p.transpose_B, p.N, p.element, B, 1, MAX_N);
  memset(C, 0, sizeof C);
  if (p.accumulate)
    for (int t = 0; t < GROUP; t++)
      for (int r = 0; r < p.N / 2; r++) C[row_of(t, r) * MAX_N + column_of(t, r)] = group.batches[t].front()[i].product.C[r];
  multiply(p.N);
  for (int t = 0; t < GROUP; t++)
    for (int r = 0; r < p.N / 2; r++) group.batches[t].front()[i].product.C[r] = C[row_of(t, r) * MAX_N + column_of(t, r)];
}

void run_batch(Warpgroup& group) {
  for (size_t i = 0; i < group.batches[0].front().size(); i++) run_one(group, i);
  for (auto& batches : group.batches) batches.pop_front();
  group.run++;
}

bool same(const Product& a, const Product& b) {
  return a.N == b.N && a.B == b.B && a.register_A == b.register_A && (a.register_A || a.A == b.A) && a.accumulate == b.accumulate;
}

// All 128 threads have committed the batch: now it is one operation
void issue_batch(Warpgroup& group, int warpgroup, Site site) {
  size_t which = group.complete - group.run;
  const std::vector<Issued>& first = group.batches[0][which];
  for (auto& batches : group.batches)
    if (batches[which].size() != first.size()) fail("wgmma", site, "the threads of a warpgroup commit different numbers of wgmma");
  Agent agent = warpgroup_agent(block_threads(), warpgroup);
  for (size_t i = 0; i < first.size(); i++) {
    const Product& p = first[i].product;
    for (auto& batches : group.batches)
      if (!same(batches[which][i].product, p)) fail("wgmma", first[i].site, "the threads of a warpgroup give wgmma different operands");
    if (!p.register_A) check_operand(p.A, p.transpose_A, M, group.known.front(), agent, group.complete + 1, first[i].site);
    check_operand(p.B, p.transpose_B, p.N, group.known.front(), agent, group.complete + 1, first[i].site);
  }
  group.known.pop_front();
  group.commits.pop_front();
  group.complete++;
  enqueue([&group] { run_batch(group); });
}

// Each k-step of a product names the same accumulator, and a later batch may too: the last one counts
void add_busy(std::vector<Busy>& busy, const void* registers, size_t bytes, bool written, uint32_t batch, Site site) {
  const char* begin = static_cast<const char*>(registers);
  for (Busy& b : busy)
    if (b.begin == begin && b.written == written) {
      b = {begin, begin + bytes, written, batch, site};
      return;
    }
  busy.push_back({begin, begin + bytes, written, batch, site});
}

struct BatchesRun : Condition {
  Warpgroup& group;
  uint32_t until;
  BatchesRun(Warpgroup& group, uint32_t until) : group(group), until(until) {}
  bool ready() override { return group.run >= until; }
  std::string text() override {
    return group.complete < until ? "waits for wgmma that not all of its warpgroup committed" : "waits for wgmma";
  }
};

}  // namespace

void reset_products(int threads) {
  for (int g = 0; g <= threads / GROUP && g < MAX_WARPGROUPS; g++) {
    Warpgroup& group = groups[g];
    for (int t = 0; t < GROUP; t++) group.open[t].clear(), group.batches[t].clear(), group.busy[t].clear(), group.committed[t] = 0;
    group.known.clear(), group.commits.clear();
    group.complete = group.run = 0;
  }
}

void product(const Product& p) {
  Site site = EMU_SITE;
  if (!p.register_A && p.A >> 62 == 0) fail("unknown", site, "a wgmma operand A without swizzle");
  if (p.B >> 62 == 0) fail("unknown", site, "a wgmma operand B without swizzle");
  Warpgroup& group = groups[current() / GROUP];
  int t = current() % GROUP;
  group.open[t].push_back({p, site});
  uint32_t batch = group.committed[t] + 1;
  add_busy(group.busy[t], p.C, p.N / 2 * 4, true, batch, site);
  if (p.register_A) add_busy(group.busy[t], p.A_registers, 16, false, batch, site);
}

void check_registers(const void* address, size_t bytes, bool write, Site site) {
  const char* begin = static_cast<const char*>(address);
  for (const Busy& busy : groups[current() / GROUP].busy[current() % GROUP])
    if (begin < busy.end && begin + bytes > busy.begin && (write || busy.written) && check_order)
      fail("wgmma", site, "%s registers of the wgmma at {%p} before a wait for it", write ? "overwrites" : "reads", busy.site);
}

void product_commit() {
  Site site = EMU_SITE;
  Warpgroup& group = groups[current() / GROUP];
  int t = current() % GROUP;
  group.batches[t].push_back(std::move(group.open[t]));
  group.open[t].clear();
  size_t which = group.committed[t]++ - group.complete;
  if (which == group.known.size()) group.known.push_back(*knowledge), group.commits.push_back(0);
  group.known[which].meet(*knowledge);
  if (++group.commits[which] == GROUP) issue_batch(group, current() / GROUP, site);
}

void product_wait(int but) {
  Site site = EMU_SITE;
  Warpgroup& group = groups[current() / GROUP];
  uint32_t committed = group.committed[current() % GROUP];
  uint32_t until = committed > uint32_t(but) ? committed - but : 0;
  BatchesRun run(group, until);
  block(run, site);
  auto& busy = group.busy[current() % GROUP];
  busy.erase(std::remove_if(busy.begin(), busy.end(), [&](const Busy& b) { return b.batch <= until; }), busy.end());
  uint32_t& known = knowledge->seen.counts[warpgroup_agent(block_threads(), current() / GROUP)];
  known = std::max(known, until);
}

void check_products_at_exit(int threads) {
  for (int g = 0; g < threads / GROUP; g++)
    for (auto& open : groups[g].open)
      if (!open.empty()) fail("wgmma", open[0].site, "the block ends and this wgmma was never committed");
}

}  // namespace emu
