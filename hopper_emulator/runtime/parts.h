// What the parts of the runtime owe each other, and no kernel sees.
#pragma once
#include "fibers.h"

// Called from Python
#define EMU_EXPORT __attribute__((visibility("default")))

namespace emu {

constexpr size_t SHARED_LIMIT = 232448;  // dynamic shared memory of a Hopper thread block: 227 KiB
constexpr int REGISTER_FILE = 65536;

// The agents of a block, in this order: threads, mbarriers, warpgroups, threads that store by TMA
inline Agent barrier_agent(int threads, int barrier) { return threads + barrier; }
inline Agent warpgroup_agent(int threads, int warpgroup) { return threads + MAX_BARRIERS + warpgroup; }
inline Agent first_storer(int threads) { return threads + MAX_BARRIERS + MAX_WARPGROUPS; }
inline int block_threads() { return launch.block.x * launch.block.y * launch.block.z; }

void seed_schedule(uint32_t seed);
bool on_stack(const void* address);  // of the running thread
void clear_failure();

void reset_shared();
void reset_barriers(int threads, size_t agents);
void reset_copies();
void reset_products(int threads);
void check_copies_at_exit(int threads);
void check_products_at_exit(int threads);

// Shared memory. `at` is a byte offset; what an ordinary instruction, the async proxy or a copy in flight may do is checked here
size_t shared_offset(const void* address);  // from the start of dynamic shared memory; SIZE_MAX if it is not shared
unsigned char* shared_at(size_t at);
enum class Kind : uint8_t { nothing, ordinary, tma, copy };
void ordinary_read(size_t at, size_t bytes, Site site);
void ordinary_write(size_t at, size_t bytes, Site site);
void async_read(size_t at, size_t bytes, const Knowledge& known, Agent reader, uint32_t count, Site site, const char* what);
void async_write_begins(size_t at, size_t bytes, Agent writer, Kind kind, Site site);
void async_write_ends(size_t at, size_t bytes, uint32_t count);

// Registers, which live on a fiber's stack: fails if a wgmma is still at work on them
void check_registers(const void* address, size_t bytes, bool write, Site site);

// Global memory: fails unless every byte belongs to an argument of the kernel
void check_global(const void* address, size_t bytes, Site site, const char* what);

// mbarriers
int barrier_of(const void* address, Site site);  // its number; fails if it was never initialised
uint32_t bytes_landed(int barrier, int bytes);   // the count of the phase that they complete, or help to
Agent agent_of(int barrier);
bool fenced_init(int barrier);

}  // namespace emu
