// The pretended device: its memory, its launches, and what a warp's lanes do together.
#include <cstdlib>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/device.cuh"
#include "settings.h"

namespace {

constexpr int kLanes = emulator::kLanes;
constexpr int kMostSharedBytes = 227 << 10;

int multiprocessors = 132, shared_limit = kMostSharedBytes;
int fixed_schedule = -1;
unsigned launches;
std::string left_out_file;
int left_out_line;
std::string last_error;

struct Copies {
  std::deque<std::pair<emulated::Copy, int>> pending;  // with the number of its group
  int groups = 0;                                      // ended so far
};
std::vector<Copies> copies(emulator::kMaxThreads);  // of the thread block that runs
Copies& own_copies() { return copies[emulator::place().thread]; }

// A barrier that counts bytes, in the 64 bits that the kernels give it.
struct Phases {
  uint32_t started : 1, over : 31;  // phases that are over
  int32_t bytes;                    // that the phase under way still expects, or, before it says so, has asked for
};
static_assert(sizeof(Phases) == sizeof(uint64_t));
Phases& phases_of(uint64_t* barrier) { return *reinterpret_cast<Phases*>(barrier); }

struct BulkCopy {
  uint64_t* barrier;
  emulated::Copy copy;
  int bytes;
};
std::vector<BulkCopy> bulk_copies;  // of the thread block that runs
unsigned bulk_group;
// Of a thread: products that have been started, and the sums that they add to.
struct TeamProduct {
  int first, n;  // of the sums
  uint32_t a[4];
  emulated::Matrix b;
  bool is_committed;
};
struct TeamProducts {
  float (*sums)[4] = nullptr;
  std::vector<float> values;
  std::vector<TeamProduct> pending;
};
std::vector<TeamProducts> products(emulator::kMaxThreads);  // of the thread block that runs
TeamProducts& own_products() { return products[emulator::place().thread]; }
// B of a team's products as the first of its threads to start each found it.
std::vector<std::vector<std::string>> factors(emulator::kMaxThreads / emulator::kTeam);
std::vector<std::string>& own_factors() { return factors[emulator::place().thread / emulator::kTeam]; }
std::string bytes_of(const TeamProduct& p) {
  const size_t half = p.n * 8 * 16;
  return std::string(p.b.at, half) + std::string(p.b.at + p.b.half_bytes, half);
}

constexpr char kUnawaited[] = "asynchronous copies that nothing waited for";

}  // namespace

extern "C" {

void halfbyte_emulator_device(int processors, int shared_bytes) {
  multiprocessors = processors, shared_limit = shared_bytes;
}
void halfbyte_emulator_schedule(int schedule) { fixed_schedule = schedule; }
void halfbyte_emulator_leave_out(const char* file, int line) { left_out_file = file, left_out_line = line; }

cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidValue : cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? shared_limit
                                                                  : 9;  // compute capability 9.x
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return posix_memalign(memory, 256, bytes) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error ? last_error.c_str() : "no error"; }

}  // extern "C"

namespace emulated {

bool is_left_out(const Where& where) {
  if (where.line != left_out_line) return false;
  const std::string_view file = where.file;
  return file.ends_with(left_out_file);
}

int run(int blocks, int threads, size_t shared_bytes, const std::function<void()>& thread) {
  last_error.clear(), bulk_copies.clear();
  // In order, in reverse, shuffled, shuffled in another way, and so on.
  const unsigned n = launches++, schedule = fixed_schedule >= 0 ? fixed_schedule : n % 4 < 2 ? n % 4 : n;
  if (shared_bytes > (size_t)shared_limit)
    last_error = "a launch with " + std::to_string(shared_bytes) + " bytes of shared memory";
  else if (blocks < 1 || threads < 1)
    last_error = "a launch of nothing";
  else
    last_error = emulator::run({blocks, threads, schedule, (int)shared_bytes}, [&](unsigned, unsigned) {
      own_copies() = {}, own_products() = {}, own_factors() = {};
      if (bulk_group != emulator::place().group && !bulk_copies.empty()) emulator::refuse(kUnawaited, 0);
      bulk_group = emulator::place().group;
      thread();
      if (!own_copies().pending.empty()) emulator::refuse(kUnawaited, 0);
    });
  if (last_error.empty() && !bulk_copies.empty()) last_error = kUnawaited;
  if (last_error.empty()) return cudaSuccess;
  last_error += ", schedule " + std::to_string(schedule);
  return cudaErrorLaunchFailure;
}

void start_copy(Copy copy, int line) {
  if (((uintptr_t)copy.to | (uintptr_t)copy.from) % 16)
    emulator::refuse("an asynchronous copy that is not aligned", line);
  own_copies().pending.push_back({copy, own_copies().groups});
}

void end_group() { own_copies().groups++; }

bool finish_copy(int pending_groups, Copy& copy) {
  Copies& own = own_copies();
  if (own.pending.empty() || own.pending.front().second >= own.groups - pending_groups) return false;
  copy = own.pending.front().first;
  own.pending.pop_front();
  return true;
}

void start_barrier(uint64_t* barrier) { phases_of(barrier) = {1, 0, 0}; }

void expect_bytes(uint64_t* barrier, int bytes, int line) {
  if (!phases_of(barrier).started || phases_of(barrier).bytes)
    emulator::refuse("a barrier that is not at the start of a phase", line);
  phases_of(barrier).bytes = bytes;
}

void start_bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, int line) {
  if (((uintptr_t)to | (uintptr_t)from | (unsigned)bytes) % 16)
    emulator::refuse("a bulk copy that is not aligned", line);
  memset(to, 0xff, bytes);
  bulk_copies.push_back({barrier, {to, from}, bytes});
}

void wait_for_phase(uint64_t* barrier, int parity, int line) {
  Phases& phases = phases_of(barrier);
  if ((int)(phases.over & 1) != parity) return;
  for (size_t i = 0; i < bulk_copies.size();) {
    const BulkCopy bulk = bulk_copies[i];
    if (bulk.barrier != barrier) {
      i++;
      continue;
    }
    memcpy(bulk.copy.to, bulk.copy.from, bulk.bytes);
    phases.bytes -= bulk.bytes;
    bulk_copies.erase(bulk_copies.begin() + i);
  }
  if (!phases.started || phases.bytes) emulator::refuse("waits for bytes that nobody asked for", line);
  phases.over++;
}

namespace {

struct Product {
  float* c;
  const uint32_t *a, *b;
  bool is_bf16;
};

float element(uint32_t pair, int i, bool is_bf16) {
  const auto bits = (uint16_t)(pair >> 16 * i);
  return is_bf16 ? halfbyte::bf16_to_float(bits) : halfbyte::half_to_float(bits);
}

// The layout is that of mma.m16n8k16 in the PTX manual.
void multiply(void* const* brought, int) {
  const auto lane_of = [&](int i) -> Product& { return *static_cast<Product*>(brought[i]); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; lane++) {
    const Product& own = lane_of(lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; i++)
      a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = element(own.a[i / 2], i % 2, own.is_bf16);
    for (int i = 0; i < 4; i++) b[2 * t + i / 2 * 8 + i % 2][g] = element(own.b[i / 2], i % 2, own.is_bf16);
  }
  for (int lane = 0; lane < kLanes; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = lane_of(lane).c[i];
      for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[k][column];
      lane_of(lane).c[i] = (float)sum;
    }
}

// The layout is that of ldmatrix in the PTX manual.
struct Rows {
  const void* row;
  uint32_t* x;
};

void load(void* const* brought, int) {
  const auto lane_of = [&](int i) -> Rows& { return *static_cast<Rows*>(brought[i]); };
  for (int lane = 0; lane < kLanes; lane++)
    for (int m = 0; m < 4; m++)
      memcpy(&lane_of(lane).x[m], static_cast<const char*>(lane_of(8 * m + lane / 4).row) + lane % 4 * 4, 4);
}

// The layouts are those of wgmma.m64nNk16 in the PTX manual, with A in registers and B as matrix_place says.
void multiply_of_team(void* const* brought, int threads) {
  const auto thread_of = [&](int i) -> TeamProducts& { return *static_cast<TeamProducts*>(brought[i]); };
  std::vector<float> b(16 * 256);
  for (size_t p = 0; p < thread_of(0).pending.size(); p++) {
    const TeamProduct& one = thread_of(0).pending[p];
    if (!one.is_committed) break;
    if (own_factors()[p] != bytes_of(one))
      return emulator::refuse("a factor that changes while its product is under way", 0);
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8 * one.n; column++) {
        uint16_t bits;
        memcpy(&bits, one.b.at + k / 8 * one.b.half_bytes + column * 16 + k % 8 * 2, 2);
        b[k * 8 * one.n + column] = halfbyte::half_to_float(bits);
      }
    float a[64][16];
    for (int i = 0; i < threads; i++) {
      const TeamProducts& own = thread_of(i);
      if (p >= own.pending.size() || own.pending[p].b.at != one.b.at || own.pending[p].first != one.first)
        return emulator::refuse("a product that not all warps of a team start", 0);
      for (int e = 0; e < 8; e++)
        a[i / kLanes * 16 + i % kLanes / 4 + e / 2 % 2 * 8][i % 4 * 2 + e / 4 * 8 + e % 2] =
            element(own.pending[p].a[e / 2], e % 2, false);
    }
    for (int i = 0; i < threads; i++)
      for (int e = 0; e < 4 * one.n; e++) {
        const int row = i / kLanes * 16 + i % kLanes / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + i % 4 * 2 + e % 2;
        double sum = thread_of(i).values[4 * one.first + e];
        for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[k * 8 * one.n + column];
        thread_of(i).values[4 * one.first + e] = (float)sum;
      }
  }
  own_factors().clear();
}

void nothing(void* const*, int) {}

void transpose(void* const* brought, int) {
  uint16_t m[8][8];
  for (int lane = 0; lane < kLanes; lane++) memcpy(&m[lane / 4][lane % 4 * 2], brought[lane], 4);
  for (int lane = 0; lane < kLanes; lane++) {
    const uint16_t column[2] = {m[lane % 4 * 2][lane / 4], m[lane % 4 * 2 + 1][lane / 4]};
    memcpy(brought[lane], column, 4);
  }
}

template <unsigned (*Both)(unsigned, unsigned)>
void reduce(void* const* brought, int lanes) {
  unsigned all = 0;
  for (int i = 0; i < lanes; i++) all = Both(all, *static_cast<unsigned*>(brought[i]));
  for (int i = 0; i < lanes; i++) *static_cast<unsigned*>(brought[i]) = all;
}
unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }
unsigned either(unsigned a, unsigned b) { return a | b; }

}  // namespace

void mma(float c[4], const uint32_t a[4], const uint32_t b[2], bool is_bf16, int line) {
  Product own = {c, a, b, is_bf16};
  emulator::together(multiply, &own, line);
}

void load_matrices(uint32_t x[4], const void* row, int line) {
  if ((uintptr_t)row % 16) emulator::refuse("a row of a matrix that is not aligned", line);
  Rows own = {row, x};
  emulator::together(load, &own, line);
}

void start_products(float (*sums)[4], int n) {
  TeamProducts& own = own_products();
  own.sums = sums, own.values.assign(&sums[0][0], &sums[0][0] + 4 * n);
  memset(sums, 0xff, own.values.size() * sizeof(float));
}

void start_product(float (*sums)[4], int n, const uint32_t a[4], Matrix b, int line) {
  TeamProducts& own = own_products();
  if (!own.sums) return emulator::refuse("a product before its start", line);
  own.pending.push_back({(int)(sums - own.sums), n, {a[0], a[1], a[2], a[3]}, b, false});
  if (own_factors().size() < own.pending.size()) own_factors().push_back(bytes_of(own.pending.back()));
}

void commit_products() {
  for (TeamProduct& product : own_products().pending) product.is_committed = true;
}

void wait_for_products(int line) {
  TeamProducts& own = own_products();
  emulator::all_of_team(multiply_of_team, &own, line);
  if (own.sums && !own.pending.empty() && own.pending.back().is_committed)
    memcpy(own.sums, own.values.data(), own.values.size() * sizeof(float));
  own = {};
}

void team_barrier(int line) { emulator::all_of_team(nothing, nullptr, line); }

uint32_t transpose_8x8(uint32_t x, int line) {
  emulator::together(transpose, &x, line);
  return x;
}

unsigned largest_of_warp(unsigned value, int line) {
  emulator::together(reduce<larger>, &value, line);
  return value;
}

unsigned any_of_warp(unsigned value, int line) {
  emulator::together(reduce<either>, &value, line);
  return value;
}

}  // namespace emulated
