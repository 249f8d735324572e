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
constexpr int kLine = 128;  // bytes that one prefetch brings

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

// A segment: the queries of a row tile, of a sequence and a KV head.
struct SegmentPlace {
  int index, b, head, tile;
};

// The thread blocks that share a segment.
struct Sharers {
  int first, n;
};

// What a thread block works on. It lies in shared memory, since registers have no room for it beside tiles.
struct alignas(16) Segment {
  SegmentPlace place;
  Sharers sharers;
  int raw_slots;  // how many there are of raw results
};

// What a thread block has beside its rings, in floats, each part a multiple of four.
struct WorkPlan {
  int fragments, rows, raw_rows, raw, slots, products, barriers, end;
};

HALFBYTE_INLINE constexpr WorkPlan work_plan(int head_dim, int warps, bool turns) {
  WorkPlan plan{};
  plan.rows = plan.fragments + 4 * head_dim;
  plan.raw_rows =
      plan.rows + 5 * kTileRows + (kTileRows * (int)(sizeof(OutputRow) + sizeof(RowSight)) + (int)sizeof(Segment)) / 4;
  plan.raw = plan.raw_rows + 2 * raw_slots(head_dim, warps) * kTileRows;
  plan.slots = plan.raw + raw_slots(head_dim, warps) * kTileRows * raw_pitch(head_dim);
  plan.products = plan.slots + warps * part_bytes(head_dim) / 4;
  plan.barriers = plan.products + (turns ? head_dim / 16 * 4 * kSimd : 0);
  plan.end = plan.barriers + warps * kMaxStages * 2;
  return plan;
}

// ---- A call

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
  int n_raw, raw_blocks;    // spans, and blocks of tokens in all of them
  int first_tile, n_tiles;  // packed tokens that any query sees, in tiles of kTileTokens
  int blocks, splits;       // splits > 0: so many thread blocks a segment, that is, a (sequence, head, row tile)
  int share, larger;        // so many items a block, of a segment's or of all, and one more for the first `larger`
  int first_weight;         // a segment's first item counts for so many more
  int warps, stages;        // stages: tiles of each warp that are under way
  int bytes;                // of a stage
  int head_bytes;           // of a KV head's part of a page
  int k_shift, v_shift;     // a span's group is span >> shift, where groups are whole spans
  int* arrivals;            // [batch][kv_heads][row tiles], zero between calls
  WorkPlan plan;
};

HALFBYTE_INLINE SegmentPlace segment_place(const AttendShape& s, int index) {
  const unsigned tiles = row_tiles(s), heads = s.kv_heads, of_heads = (unsigned)index / tiles;
  return {index, (int)(of_heads / heads), (int)(of_heads % heads), (int)((unsigned)index % tiles)};
}

__device__ __forceinline__ void next_segment(const AttendShape& s, SegmentPlace& at) {
  at.index++;
  if (++at.tile < row_tiles(s)) return;
  at.tile = 0;
  if (++at.head < s.kv_heads) return;
  at.head = 0, at.b++;
}

// A token's span is token >> span_shift.
__device__ __forceinline__ int span_shift(const Turn& turn) { return turn.span == kBlockTokens ? 4 : 6; }

// That memory while a segment is worked on.
struct Work {
  uint2* fragments;    // [d / 16][32]: queries in code domain as B, then what the packed tokens gave
  float* offset;       // [kTileRows] q·mu
  float* factor;       // [kTileRows]: a score is factor · product
  float* raw_top;      // [kTileRows] maxima of raw tokens' scores
  float* raw_sum;      // [kTileRows] of weights
  OutputRow* outputs;  // [kTileRows]
  Segment* segment;
  float* raw_tops;     // [raw slots][kTileRows]
  float* raw_sums;     // [raw slots][kTileRows]
  float* raw;          // [raw slots][kTileRows][raw_pitch]
  float* slots;        // offsets that turn: [spans][kTileRows]
  uchar* parts;        // [warps] parts, in the same place: see merge.cuh
  float* turn_factor;  // [kTileRows]
  uint4* products;     // [d / 16][32]: see turn_products
  RowSight* sights;    // [kTileRows]
};

__device__ __forceinline__ Work work_at(float* memory, const WorkPlan& plan, int slots) {
  float* rows = memory + plan.rows;
  return {reinterpret_cast<uint2*>(memory + plan.fragments),
          rows,
          rows + kTileRows,
          rows + 2 * kTileRows,
          rows + 3 * kTileRows,
          reinterpret_cast<OutputRow*>(rows + 5 * kTileRows),
          reinterpret_cast<Segment*>(rows + 5 * kTileRows + kTileRows * sizeof(OutputRow) / 4),
          memory + plan.raw_rows,
          memory + plan.raw_rows + slots * kTileRows,
          memory + plan.raw,
          memory + plan.slots,
          reinterpret_cast<uchar*>(memory + plan.slots),
          rows + 4 * kTileRows,
          reinterpret_cast<uint4*>(memory + plan.products),
          reinterpret_cast<RowSight*>(rows + 5 * kTileRows + (kTileRows * sizeof(OutputRow) + sizeof(Segment)) / 4)};
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

// Blocks of 16 of all raw tokens.
HALFBYTE_INLINE int raw_blocks(const AttendCall& call) {
  int n = 0;
  for (int i = 0; i < call.n_raw; i++) n += (call.raw[i].end - call.raw[i].begin + kBlockTokens - 1) / kBlockTokens;
  return n;
}

// Tiles that take as long as preparing the queries of one more segment and finishing it; those that the block with a
// segment's raw tokens has less time for, at most.
constexpr int kSegmentTiles = 40, kRawTiles = 20;
constexpr int kLeastTiles = 4;  // of a block that shares a segment

// Whole segments to blocks, or parts of one segment, unless that leaves too many multiprocessors idle: then blocks
// cross from one segment into the next. What is less than a tile a warp stays together. all: tiles of all segments.
HALFBYTE_INLINE void split_work(AttendCall& call, int all, int processors) {
  const int segments = all / call.n_tiles;
  const int most = call.n_tiles < call.warps ? 1 : max(1, call.n_tiles / kLeastTiles);
  call.splits = max(1, min(most, processors / segments));
  call.blocks = segments * call.splits;
  const int rounds = (call.blocks + processors - 1) / processors, part = call.n_tiles / call.splits;
  if (rounds * (part + kSegmentTiles) <= all / processors + 2 * kSegmentTiles || call.splits == most) {
    call.first_weight = call.splits > 1 ? min(kRawTiles, part / 4) : 0;
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
  int first, last;        // its tiles are work items first, first + warps, … before `last`
  uint8_t* memory;        // [stages][bytes of a stage]
  CopyBarrier* barriers;  // [stages], where copies are bulk copies
  int slot, round;        // the slot to read, and then to fill, next; how often the ring has begun anew, modulo 2
  unsigned asked;         // tiles asked for so far
  const uint8_t* ahead;   // lane i: address of the i-th tile from asked / 32 · 32
};

__device__ __forceinline__ void next_slot(const AttendCall& call, Ring& ring) {
  if (++ring.slot == call.stages) ring.slot = 0, ring.round ^= 1;
}

// at: the item's segment, or one before it.
__device__ __forceinline__ const uint8_t* tile_address(const AttendCall& call, SegmentPlace at, int item) {
  const Pages& pages = call.buffers.pages;
  while (item - at.index * call.n_tiles >= call.n_tiles) next_segment(call.shape, at);
  const int token = (call.first_tile + item - at.index * call.n_tiles) * kTileTokens;
  const int64_t page = pages.table[(int64_t)at.b * pages.table_stride + token / kPageTokens - pages.first_page];
  return pages.pool + page + (int64_t)at.head * call.head_bytes +
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

// Starts copying the warp's next tile to slot `slot`; an empty group once there is none, so that waiting counts on. at:
// a segment not behind the tile's. Codes, MostScales: bytes.
template <int Codes, int MostScales>
__device__ __forceinline__ void ask_for_tile(const AttendCall& call, Ring& ring, const SegmentPlace& at, int slot,
                                             int lane) {
  if (ring.asked && ring.asked % kSimd == 0) {
    const int item = ring.first + ((int)ring.asked + lane) * call.warps;
    ring.ahead = item < ring.last ? tile_address(call, at, item) : nullptr;
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

// A warp's ring, of which no tile is asked for yet. Where the first ones lie is on its way: it is asked for now, as
// later loads wait for memory that has enough to do.
__device__ __forceinline__ Ring start_ring(const AttendCall& call, float* memory, const SegmentPlace& at, int first,
                                           int last, int warp, int lane) {
  const int item = first + lane * call.warps;
  Ring ring{first,
            last,
            reinterpret_cast<uint8_t*>(memory + call.plan.end) + (size_t)warp * call.stages * call.bytes,
            reinterpret_cast<CopyBarrier*>(memory + call.plan.barriers) + warp * kMaxStages,
            0,
            0,
            0,
            item < last ? tile_address(call, at, item) : nullptr};
  if (kBulkCopies && lane < call.stages) copy_barrier_start(ring.barriers + lane);
  __syncwarp();  // the warp alone uses them
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
