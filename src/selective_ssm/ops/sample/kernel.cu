#include "cut.cuh"

// The next token of each row, chosen from its logits; reference.py says what is computed. A block serves a row, and goes
// over it as often as it must: after the first time the row lies in the multiprocessor's own cache.
//
// Macros: NUMBER (the format of the logits); DRAWS, RANKED, PENALTY, LOGPROBS (whether some row draws a token, cuts by
// top-k or top-p, penalises, wants its token's log-probability); ALIGNED, whether every row begins on a vector's boundary.

struct Parameters {
    const NUMBER* logits;   // (B, V), unit stride in V
    const float* real;      // (S, 2): temperature, penalty
    const int64* whole;     // (S, 4): stream, top-k, shares of top-p and min-p
    const int64* position;  // (as many as `positions`,)
    const uint8* seen;      // (S, V), unit stride in V; read where PENALTY
    const int64* rows;      // (B,), which of the four above; negative from their end; null for b of row b
    float* weights;         // (B, V rounded up to whole octets), where RANKED: room for them
    int64* tokens;          // (B,)
    float* logprobs;        // (B,), where LOGPROBS
    int64 logits_row, seen_row;
    int vocabulary, held, positions;  // V, S
};

// Where among `count` what belongs to row b lies; whatever `rows` holds, it is inside.
__device__ __forceinline__ int64 place_of(const Parameters& p, int64 b, int count) {
    if (p.rows == nullptr) return b;
    const int64 row = p.rows[b] + (p.rows[b] < 0 ? count : 0);
    return row < 0 ? 0 : row < count ? row : count - 1;
}

// The finaliser of the generator splitmix64.
__device__ __forceinline__ uint64 mixed(uint64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}
__device__ __forceinline__ uint64 uniform(uint64 stream, uint64 position) {
    return (mixed(stream + 0x9e3779b97f4a7c15ull * position) >> (64 - SHARE_BITS)) + 1;
}

__device__ __forceinline__ uint64 less(uint64 quota, uint64 taken) { return quota - min(quota, taken); }

// The warp among whose tokens the sum of the weights that stay reaches a share of its end, and what it has left to find:
// in shared memory, for all. Where nothing stays the index is WARPS.
__device__ __forceinline__ void find_warp(const Row& row, const Cut& cut, uint64 share) {
    Shared& s = shared();
    uint64 above = 0, equal = 0;
    for_octets(row, [&](int octet) {
        float w[8];
        load_weights(row, octet, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            above += w[i] > cut.bar ? uint64(w[i]) : 0;
            equal += w[i] == cut.bar;
        }
    });
    above = reduce_warp(above, add);
    equal = reduce_warp(equal, add);
    sync_block();
    if (lane_index() == 0) s.parts[0][warp_index()] = above, s.parts[1][warp_index()] = equal;
    if (threadIdx.x == 0) s.place.index = WARPS;
    sync_block();
    if (warp_index() == 0) {
        above = s.parts[0][lane_index()];
        equal = s.parts[1][lane_index()];
        const uint64 quota = less(cut.quota, scan_warp(equal) - equal);
        const uint64 here = above + min(equal, quota) * uint64(cut.bar), reached = scan_warp(here);
        const uint64 wanted = part(shuffle(reached, 31), share);
        if (reached - here < wanted && wanted <= reached) {
            s.place = {wanted - (reached - here), quota, uint32(lane_index())};
        }
    }
    sync_block();
}

// The token drawn, for one thread of the block, −1 for the others; where nothing stays, `otherwise`.
__device__ __forceinline__ int draw(const Row& row, const Cut& cut, uint64 share, int otherwise) {
    find_warp(row, cut, share);
    Place place = shared().place;
    if (place.index == WARPS) return threadIdx.x == 0 ? otherwise : -1;
    if (place.index != warp_index()) return -1;
    const Octets octets(row.vocabulary);
    for (int octet = octets.begin + lane_index();; octet += 32) {
        float w[8] = {};
        if (octet < octets.end) load_weights(row, octet, w);
        uint64 equal = 0, here = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) equal += w[i] == cut.bar;
        const uint64 all_equal = scan_warp(equal);
        uint64 quota = less(place.quota, all_equal - equal);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const bool at_bar = w[i] == cut.bar;
            if (w[i] < cut.bar || (at_bar && quota == 0)) w[i] = 0.0f;
            quota -= at_bar && quota > 0;
            here += uint64(w[i]);
        }
        const uint64 reached = scan_warp(here);
        int token = -1;
        uint64 sum = reached - here;
        if (sum < place.wanted && place.wanted <= reached) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum += uint64(w[i]);
                if (token < 0 && sum >= place.wanted) token = 8 * octet + i;
            }
        }
        const uint64 end = shuffle(reached, 31);
        if (place.wanted <= end) return token;
        place.wanted -= end;
        place.quota = less(place.quota, shuffle(all_equal, 31));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const __grid_constant__ Parameters p) {
    let_next_begin();
    wait_for_previous();
    const int64 b = blockIdx.x, own = place_of(p, b, p.held);
    const float temperature = p.real[2 * own];
    Row row = {p.logits + b * p.logits_row, p.seen + own * p.seen_row, nullptr, p.vocabulary};
    row.penalty = p.real[2 * own + 1];
    row.temperature = fmaxf(temperature, 0x1p-126f);
    const uint64 best = most_likely<PENALTY>(row);
    row.best = logit_of(best);
    float top = row.best, norm = 0.0f;
    if constexpr (LOGPROBS) {
        if (PENALTY) top = logit_of(most_likely<false>(row));
        norm = log_sum(row, top);
    }
    int token = threadIdx.x == 0 ? id_of(best) : -1;
    if (DRAWS && temperature > 0) {
        const int64* whole = p.whole + 4 * own;
        Cut cut = {0.0f, 0};
        if constexpr (RANKED) {
            row.weights = p.weights + b * ((p.vocabulary + 7) / 8 * 8);
            for_octets(row, [&](int octet) {
                float w[8];
                make_weights(row, octet, w);
                store8(row.weights + 8 * octet, w);
            });
            cut = best_of(row, whole[1], whole[2]);
        }
        const float least = float(whole[3]) * (UNITS / (1 << SHARE_BITS));
        if (least > cut.bar) cut = {least, EVERY};
        token = draw(row, cut, uniform(whole[0], p.position[place_of(p, b, p.positions)]), id_of(best));
    }
    if (token < 0) return;
    p.tokens[b] = token;
    if constexpr (LOGPROBS) p.logprobs[b] = to_float(row.logits[token]) - top - norm;
}
