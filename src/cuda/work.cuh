// What an attention call is made of on the device, how its tiles are dealt to thread blocks, and how warps fetch them.
#pragma once

#include "cuda/mma.cuh"
#include "gpu/attend.h"

namespace halfbyte::gpu {

constexpr int kTileTokens = 32;  // tokens that a warp takes at a time: two blocks
constexpr int kTileBlocks = kTileTokens / kBlockTokens;
// Warps of a thread block: as many as registers hold.
HALFBYTE_INLINE constexpr int max_warps(int head_dim) { return head_dim > 128 ? 8 : 16; }
constexpr int kMaxRaw = 3;  // spans of raw tokens: sinks, the tail before this step, this step's own
constexpr int kMaxStages = 8;

// A token of each sequence that is not yet in the last place of the last raw tokens; k null: none.
struct NewToken {
  const uchar *k, *v;
  Strides3 k_strides, v_strides;
};

struct AttendCall {
  AttendShape shape;
  AttendBuffers buffers;                 // partials are of another kind here, see merge.cuh
  gpu_global const uint4* fragments[2];  // R of K and the transpose of V's, see fragment_at
  RawTokens raw[kMaxRaw];
  NewToken new_token;
  int n_raw;
  int first_tile, n_tiles;  // packed tokens that any query sees, in tiles of kTileTokens
  int blocks, splits;       // splits > 0: so many thread blocks a segment, that is, a (sequence, head, row tile)
  int share, larger;        // so many items a block, of a segment's or of all, and one more for the first `larger`
  int first_weight;         // a segment's first item counts for so many more
  int warps, stages;        // stages: tiles of each warp that are under way
  int bytes;                // of a stage
  int k_shift, v_shift;     // a span's group is span >> shift, where groups are whole spans
  int* arrivals;            // [batch][kv_heads][row tiles], zero between calls
};

// ---- Shared memory

// Warps that raw tokens are dealt to, at most: as many as 16 KB hold results of.
HALFBYTE_INLINE constexpr int raw_slots(int head_dim, int warps) {
  const int most = 512 / head_dim, half = warps / 2;
  return most < half ? most : half;
}
HALFBYTE_INLINE constexpr int raw_pitch(int head_dim) { return head_dim + 2; }  // of a row: stores meet fewer banks

// Of what some tokens gave a row tile: see merge.cuh.
HALFBYTE_INLINE constexpr int part_bytes(int head_dim) { return kTileRows * (2 * head_dim + 16); }

// Where a row's results go, and what they are multiplied by.
struct alignas(16) OutputRow {
  gpu_global uchar* to;
  float of_codes, of_offset, of_raw;
};

// The thread blocks that share a segment.
struct Sharers {
  int first, n;
};

// What a thread block works on. It lies in shared memory, since registers have no room for it beside tiles.
struct alignas(16) Segment {
  int index, b, head, tile;  // (sequence, head, row tile)
  Sharers sharers;
  int raw_slots;  // how many there are of raw results
};

// What a thread block has beside its rings, in floats, each part a multiple of four.
struct WorkPlan {
  int fragments, rows, raw_rows, raw, slots, products, barriers, end;
};

HALFBYTE_INLINE constexpr WorkPlan work_plan(int head_dim, int warps, int turning_pairs) {
  WorkPlan plan{};
  plan.rows = plan.fragments + 4 * head_dim;
  plan.raw_rows = plan.rows + 5 * kTileRows + (kTileRows * (int)sizeof(OutputRow) + (int)sizeof(Segment)) / 4;
  plan.raw = plan.raw_rows + 2 * raw_slots(head_dim, warps) * kTileRows;
  plan.slots = plan.raw + raw_slots(head_dim, warps) * kTileRows * raw_pitch(head_dim);
  plan.products = plan.slots + warps * part_bytes(head_dim) / 4;
  plan.barriers = plan.products + (turning_pairs + 7) / 8 * 4 * kSimd;
  plan.end = plan.barriers + warps * kMaxStages * 2;
  return plan;
}

HALFBYTE_INLINE WorkPlan work_plan(const AttendCall& call) {
  const Turn& turn = call.buffers.turn;
  return work_plan(call.shape.format.k.head_dim, call.warps, turn.waves ? turn.pairs : 0);
}

// Steps of a product over all pairs.
__device__ __forceinline__ int turn_steps(const Turn& turn) { return (turn.pairs + 7) / 8; }

// That memory while a segment is worked on.
struct Work {
  uint2* fragments;    // [d / 16][32]: queries in code domain as B, then what the packed tokens gave
  float* offset;       // [kTileRows] q·mu
  float* factor;       // [kTileRows]: a score is factor · product
  unsigned* tops;      // [kTileRows] maxima of raw tokens' scores, as ordered_bits
  float* raw_sum;      // [kTileRows] of weights
  OutputRow* outputs;  // [kTileRows]
  Segment* segment;
  float* raw_tops;     // [raw slots][kTileRows]
  float* raw_sums;     // [raw slots][kTileRows]
  float* raw;          // [raw slots][kTileRows][raw_pitch]
  float* slots;        // offsets that turn: [spans][kTileRows]
  uchar* parts;        // [warps] parts, in the same place: see merge.cuh
  float* turn_factor;  // [kTileRows]
  uint4* products;     // [turn_steps][32]: see turn_products
};

__device__ __forceinline__ Work work_at(float* memory, const WorkPlan& plan, int slots) {
  float* rows = memory + plan.rows;
  return {reinterpret_cast<uint2*>(memory + plan.fragments),
          rows,
          rows + kTileRows,
          reinterpret_cast<unsigned*>(rows + 2 * kTileRows),
          rows + 3 * kTileRows,
          reinterpret_cast<OutputRow*>(rows + 5 * kTileRows),
          reinterpret_cast<Segment*>(rows + 5 * kTileRows + kTileRows * sizeof(OutputRow) / 4),
          memory + plan.raw_rows,
          memory + plan.raw_rows + slots * kTileRows,
          memory + plan.raw,
          memory + plan.slots,
          reinterpret_cast<uchar*>(memory + plan.slots),
          rows + 4 * kTileRows,
          reinterpret_cast<uint4*>(memory + plan.products)};
}

HALFBYTE_INLINE int stage_bytes(const PageFormat& f) {
  return kTileBlocks * (int)(block_code_bytes(f) + block_scale_bytes(f));
}

// Packed tokens that any query sees: queries come in order of position, so the first and the last bound them.
HALFBYTE_INLINE void packed_range(const AttendShape& s, bool masked, int& begin, int& end) {
  begin = max(sight_of(s, 0, masked).lo, s.sink_tokens);
  end = 0;
  for (int query = 0; query < s.queries; query++) end = max(end, sight_of(s, query * s.group, masked).packed_end);
}

// Tiles that take as long as preparing the queries of one more segment and finishing it, or as its raw tokens.
constexpr int kSegmentTiles = 40;
constexpr int kFewestTiles = 2;  // of a warp: with fewer, merging costs more than it saves

// Whole segments to blocks, or parts of one segment, unless that leaves too many multiprocessors idle: then blocks
// cross from one segment into the next. all: tiles of all segments.
HALFBYTE_INLINE void split_work(AttendCall& call, int all, int processors) {
  const int segments = all / call.n_tiles;
  const int most = max(1, call.n_tiles / (call.warps * kFewestTiles));
  call.splits = max(1, min(most, processors / segments));
  call.blocks = segments * call.splits;
  const int rounds = (call.blocks + processors - 1) / processors, part = call.n_tiles / call.splits;
  if (rounds * (part + kSegmentTiles) <= all / processors + 2 * kSegmentTiles || call.splits == most) {
    call.first_weight = call.splits > 1 ? min(kSegmentTiles, part / 4) : 0;
    call.share = (call.n_tiles + call.first_weight) / call.splits;
    call.larger = (call.n_tiles + call.first_weight) % call.splits;
    return;
  }
  call.splits = 0;
  call.blocks = min(processors, (all + call.warps - 1) / call.warps);
  call.first_weight = min(kSegmentTiles, all / call.blocks / 2);  // less than a share: every block has a tile
  const int weighed = all + segments * call.first_weight;
  call.share = weighed / call.blocks, call.larger = weighed % call.blocks;
}

// Deals the packed tokens [begin, end) of all segments; without any, each segment has a block all the same.
HALFBYTE_INLINE void deal_tiles(AttendCall& call, int begin, int end, int segments, int processors) {
  call.first_tile = begin / kTileTokens, call.n_tiles = 0, call.blocks = segments, call.splits = 1;
  call.share = call.larger = call.first_weight = 0;
  if (begin >= end) return;
  call.n_tiles = (end + kTileTokens - 1) / kTileTokens - call.first_tile;
  split_work(call, segments * call.n_tiles, processors);
}

// The work items [first, last) of a thread block, and the segment of the first one. Items are the tiles of tokens of
// all segments, one segment after the other.
struct Items {
  int segment, first, last;
};

HALFBYTE_INLINE Items items_of(const AttendCall& call, int block) {
  const int share = call.share, larger = call.larger, weight = call.first_weight, tiles = call.n_tiles;
  if (call.splits) {
    const int segment = (int)((unsigned)block / (unsigned)call.splits), part = block - segment * call.splits;
    const int from = part * share + min(part, larger), to = from + share + (part < larger ? 1 : 0);
    return {segment, segment * tiles + max(from - weight, 0), segment * tiles + max(to - weight, 0)};
  }
  const unsigned from = block * share + min(block, larger), to = from + share + (block < larger ? 1 : 0);
  const int first = (int)(from / (tiles + weight)), last = (int)(to / (tiles + weight));
  return {first, first * tiles + max((int)(from % (tiles + weight)) - weight, 0),
          last * tiles + max((int)(to % (tiles + weight)) - weight, 0)};
}

// The thread block that the i-th item of a segment belongs to; only where splits is 0.
HALFBYTE_INLINE int block_of(const AttendCall& call, int segment, int i) {
  const unsigned weighed = segment * (call.n_tiles + call.first_weight) + call.first_weight + i;
  const unsigned in_larger = call.larger * (call.share + 1), share = call.share;
  return (int)(weighed < in_larger ? weighed / (share + 1) : call.larger + (weighed - in_larger) / share);
}

HALFBYTE_INLINE Sharers sharers_of(const AttendCall& call, int segment) {
  if (call.splits) return {segment * call.splits, call.splits};
  const int first = block_of(call, segment, 0);
  return {first, block_of(call, segment, call.n_tiles - 1) - first + 1};
}

// ---- One warp's ring of tiles

struct Ring {
  uint8_t* memory;        // [stages][bytes of a stage]
  CopyBarrier* barriers;  // [stages], where copies are bulk copies
  int slot, round;        // the slot to read, and then to fill, next; how often the ring has begun anew, modulo 2
  unsigned asked;         // tiles asked for so far
  const uint8_t* ahead;   // lane i: address of the i-th tile from asked / 32 · 32
};

__device__ __forceinline__ void next_slot(const AttendCall& call, Ring& ring) {
  if (++ring.slot == call.stages) ring.slot = 0, ring.round ^= 1;
}

__device__ __forceinline__ const uint8_t* tile_address(const AttendCall& call, unsigned item) {
  const AttendShape& s = call.shape;
  const unsigned n_tiles = call.n_tiles, row = item / n_tiles / row_tiles(s), heads = s.kv_heads;
  const int token = (call.first_tile + (int)(item % n_tiles)) * kTileTokens;
  return page_of(call.buffers.pages, s.format, (int)(row / heads), (int)(row % heads), token) +
         token % kPageTokens / kTileTokens;  // a page is aligned to 16: the low bit tells which half of it
}

// Where the pieces of a tile lie: codes, then scales. tagged: see tile_address.
template <int Codes>
struct TilePieces {
  const uint8_t *codes, *scales;
  __device__ __forceinline__ TilePieces(const AttendCall& call, const uint8_t* tagged) {
    const int second_half = (int)((uint64_t)tagged & 1);
    codes = reinterpret_cast<const uint8_t*>((uint64_t)tagged & ~1ull) + second_half * Codes;
    scales = codes + kPageBlocks / kTileBlocks * Codes + second_half * (call.bytes - 2 * Codes);
  }
};

// By one thread: Hopper's way to fetch a tile.
template <int Codes>
__device__ __forceinline__ void copy_tile(const AttendCall& call, const uint8_t* tagged, uint8_t* to,
                                          CopyBarrier* barrier) {
  const TilePieces<Codes> from(call, tagged);
  copy_bulk_expect(barrier, call.bytes);
  copy_bulk(to, from.codes, Codes, barrier);
  copy_bulk(to + Codes, from.scales, call.bytes - Codes, barrier);
}

// Starts copying the warp's next tile, of work items first, first + warps, … before `last`, to slot `slot`; an empty
// group once there is none, so that waiting counts on. Codes, MostScales: bytes.
template <int Codes, int MostScales>
__device__ __forceinline__ void ask_for_tile(const AttendCall& call, Ring& ring, int slot, int first, int last,
                                             int lane) {
  if (ring.asked % kSimd == 0) {
    const int item = first + (ring.asked + lane) * call.warps;
    ring.ahead = item < last ? tile_address(call, item) : nullptr;
  }
  const auto tagged = (const uint8_t*)__shfl_sync(0xffffffffu, (uint64_t)ring.ahead, ring.asked++ % kSimd);
  uint8_t* to = ring.memory + slot * call.bytes;
  if constexpr (kBulkCopies) {
    if (tagged && lane == 0) copy_tile<Codes>(call, tagged, to, ring.barriers + slot);
  } else {
    static_assert(Codes % (kSimd * 16) == 0);
    if (tagged) {
      const TilePieces<Codes> from(call, tagged);
#pragma unroll
      for (int at = lane * 16; at < Codes; at += kSimd * 16) copy_async_16(to + at, from.codes + at);
#pragma unroll
      for (int at = lane * 16; at < MostScales; at += kSimd * 16)
        if (at < call.bytes - Codes) copy_async_16(to + Codes + at, from.scales + at);
    }
    copy_async_commit();
  }
}

// The same for slots [begin, end) of the rings of `rings` warps from `from` on, one lane a ring. own: of this warp.
template <int Codes>
__device__ __forceinline__ void fill_rings(const AttendCall& call, const Ring& own, int begin, int end, int from,
                                           int rings, int first, int last, int warp, int lane) {
  const int behind = from + lane - warp;
#pragma unroll 1
  for (int slot = begin; slot < end; slot++) {
    CopyBarrier* barrier = own.barriers + behind * kMaxStages + slot;
    if (lane < rings) copy_barrier_start(barrier);
    __syncwarp();  // that instruction is the warp's, though each lane has a barrier of its own
    const int item = first + from + lane + slot * call.warps;
    if (lane < rings && item < last)
      copy_tile<Codes>(call, tile_address(call, item), own.memory + (behind * call.stages + slot) * call.bytes,
                       barrier);
  }
}

// A warp's ring, of which no tile is asked for; where copies are bulk copies, fill_rings does that for the first ones.
__device__ __forceinline__ Ring start_ring(const AttendCall& call, float* memory, const WorkPlan& plan, int first,
                                           int last, int warp, int lane) {
  Ring ring{reinterpret_cast<uint8_t*>(memory + plan.end) + (size_t)warp * call.stages * call.bytes,
            reinterpret_cast<CopyBarrier*>(memory + plan.barriers) + warp * kMaxStages,
            0,
            0,
            0,
            nullptr};
  if constexpr (kBulkCopies) {
    const int item = first + warp + lane * call.warps;
    ring.asked = call.stages, ring.ahead = item < last ? tile_address(call, item) : nullptr;
  }
  return ring;
}

// Waits for the tile in the ring's slot, in every lane's eyes.
__device__ __forceinline__ void wait_for_tile(const AttendCall& call, const Ring& ring) {
  if constexpr (kBulkCopies) {
    copy_bulk_wait(ring.barriers + ring.slot, ring.round);
  } else {
    copy_async_wait(call.stages - 1);
    __syncwarp();
  }
}

}  // namespace halfbyte::gpu
