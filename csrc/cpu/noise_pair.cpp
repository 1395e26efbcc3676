// noise_pair on the CPU. Normals are drawn a tile at a time into the nearest cache, a Philox call a
// lane, and then the pair is made from them. CMakeLists.txt compiles this file without contraction,
// so that a product and a sum are one fma only where that is written, and every instruction set
// gives the same bits: what has no such instruction calls the C library's.
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 headers, GCC bug 105593
#include <cmath>

#include "noise_pair.h"
#include "vec.h"

namespace tdkern {

constexpr int kCalls = 16;         // of Philox, a tile
constexpr int kTile = 4 * kCalls;  // elements

namespace TDKERN_ISA {

// ---- draws: as many Philox calls at a time as a register of this set has 32-bit lanes ----

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#define TDKERN_MM(op) _mm512_##op
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#define TDKERN_MM(op) _mm256_##op
#else
constexpr int kWidth = 4;
#define TDKERN_MM(op) _mm_##op
#endif

struct Lanes {  // the operations of Lane (noise_pair_math.h) on a register
  using F = VecOf<float, kWidth>::type;
  using I = VecOf<int32_t, kWidth>::type;
  using U = VecOf<uint32_t, kWidth>::type;
  using W = VecOf<uint64_t, kWidth / 2>::type;
  static TDKERN_INLINE F to_float(I value) { return __builtin_convertvector(value, F); }
  static TDKERN_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
  template <typename To, typename From>
  static TDKERN_INLINE To bits(From from) {
    return reinterpret_cast<To>(from);
  }
#if defined(__x86_64__)
  static TDKERN_INLINE W multiply(W word, uint32_t factor) {
    auto all = TDKERN_MM(set1_epi32)(static_cast<int>(factor));
    return reinterpret_cast<W>(TDKERN_MM(mul_epu32)(reinterpret_cast<decltype(all)>(word), all));
  }
  static TDKERN_INLINE F sqrt(F value) { return TDKERN_MM(sqrt_ps)(value); }
#else
  static TDKERN_INLINE W multiply(W word, uint32_t factor) {
    return (word & 0xffffffff) * static_cast<uint64_t>(factor);
  }
  static TDKERN_INLINE F sqrt(F value) {
    for (int l = 0; l < kWidth; ++l) value[l] = std::sqrt(value[l]);
    return value;
  }
#endif
#if defined(__FMA__)
  static TDKERN_INLINE F fma(F a, F b, F c) { return TDKERN_MM(fmadd_ps)(a, b, c); }
#else
  static TDKERN_INLINE F fma(F a, F b, F c) {
    for (int l = 0; l < kWidth; ++l) c[l] = std::fma(a[l], b[l], c[l]);
    return c;
  }
#endif
};

// The call of a tile that each lane makes: of kWidth calls at a time, lane 4 g + j makes call
// kWidth / 4 j + g, which is what `transpose` wants.
constexpr int call_of(int lane) {
  return lane / kWidth * kWidth + kWidth / 4 * (lane % 4) + lane % kWidth / 4;
}

// The words of kWidth calls, word w of all of them in words[w]. block, sample: the first two words
// of each lane's counter. A product takes 64 bits, so the even lanes go first and then the odd
// ones.
TDKERN_INLINE void philox_calls(const uint32_t* block,
                                const uint32_t* sample,
                                uint64_t offset,
                                uint32_t stream,
                                uint64_t key,
                                Lanes::U (&words)[4]) {
  Lanes::W blocks, samples;
  memcpy(&blocks, block, sizeof(blocks));
  memcpy(&samples, sample, sizeof(samples));
  const Lanes::W low = Lanes::W{} + (offset & 0xffffffff),
                 high = Lanes::W{} + (offset >> 32 << 1 | stream);
  Lanes::W c[2][4] = {{blocks, samples, low, high}, {blocks >> 32, samples >> 32, low, high}};
  philox<Lanes>(c, philox_keys(key));
  for (int w = 0; w < 4; ++w)
    words[w] = Lanes::bits<Lanes::U>((c[0][w] & 0xffffffff) | (c[1][w] << 32));
}

// The four normals of each call behind one another.
TDKERN_INLINE void transpose(const Lanes::F (&n)[4], float* to) {
#if defined(__x86_64__)
  const auto low = [](auto a, auto b)
                       __attribute__((always_inline)) { return TDKERN_MM(unpacklo_ps)(a, b); };
  const auto high = [](auto a, auto b)
                        __attribute__((always_inline)) { return TDKERN_MM(unpackhi_ps)(a, b); };
  const auto a = TDKERN_MM(castps_pd)(low(n[0], n[1])), b = TDKERN_MM(castps_pd)(low(n[2], n[3]));
  const auto c = TDKERN_MM(castps_pd)(high(n[0], n[1])), d = TDKERN_MM(castps_pd)(high(n[2], n[3]));
  TDKERN_MM(store_pd)(reinterpret_cast<double*>(to), TDKERN_MM(unpacklo_pd)(a, b));
  TDKERN_MM(store_pd)(reinterpret_cast<double*>(to + kWidth), TDKERN_MM(unpackhi_pd)(a, b));
  TDKERN_MM(store_pd)(reinterpret_cast<double*>(to + 2 * kWidth), TDKERN_MM(unpacklo_pd)(c, d));
  TDKERN_MM(store_pd)(reinterpret_cast<double*>(to + 3 * kWidth), TDKERN_MM(unpackhi_pd)(c, d));
#else
  for (int lane = 0; lane < kWidth; ++lane)
    for (int w = 0; w < 4; ++w) to[4 * call_of(lane) + w] = n[w][lane];
#endif
}

TDKERN_INLINE void draw(const uint32_t* block,
                        const uint32_t* sample,
                        uint64_t offset,
                        uint32_t stream,
                        uint64_t key,
                        float* to) {
  for (int first = 0; first < kCalls; first += kWidth) {
    Lanes::U words[4];
    philox_calls(block + first, sample + first, offset, stream, key, words);
    Lanes::F n[4];
    box_muller<Lanes>(words[0], words[1], n[0], n[1]);
    box_muller<Lanes>(words[2], words[3], n[2], n[3]);
    transpose(n, to + 4 * first);
  }
}
TDKERN_INLINE void draw(const uint32_t* block,
                        const uint32_t* sample,
                        uint64_t offset,
                        uint32_t stream,
                        uint64_t key,
                        double* to) {
  for (int first = 0; first < kCalls; first += kWidth) {
    Lanes::U words[4];
    philox_calls(block + first, sample + first, offset, stream, key, words);
    for (int lane = 0; lane < kWidth; ++lane) {
      double* four = to + 4 * (first + call_of(lane));
      box_muller(words[0][lane], words[1][lane], four[0], four[1]);
      box_muller(words[2][lane], words[3][lane], four[2], four[3]);
    }
  }
}

template <typename T>
struct Tile {
  alignas(64) T n1[kTile], n2[kTile];
  alignas(64) uint32_t block[kCalls], sample[kCalls];  // of each lane

  TDKERN_INLINE void draw_both(uint64_t offset, uint64_t key, bool shared) {
    draw(block, sample, offset, 0, key, n1);
    if (!shared) draw(block, sample, offset, 1, key, n2);
  }
};

// ---- the pair ----

template <bool kShared, bool kStreamed, typename D>
TDKERN_INLINE void row(const PairRows<D>& in, int64_t b, int64_t begin, int64_t end) {
  using T = typename PairRows<D>::T;
  const auto at = [&](const auto& rows) { return rows.data + b * rows.stride; };
  const D* x0 = at(in.x0);
  D *x_t = at(in.x_t), *x_tp = at(in.x_tp);
  const PairSample<T> s = in.sample(b);
  const uint64_t key = in.key(), offset = in.counter();
  Tile<T> tile;
  for (int lane = 0; lane < kCalls; ++lane) tile.sample[lane] = in.word(b);
  for (int64_t k = begin; k < end; k += kTile) {
    for (int lane = 0; lane < kCalls; ++lane)
      tile.block[lane] = static_cast<uint32_t>(k / 4) + call_of(lane);
    tile.draw_both(offset, key, kShared);
    const int64_t left = std::min<int64_t>(kTile, end - k);
    for_each_vector<T>(0, left, [&](int64_t v, auto... count) __attribute__((always_inline)) {
      Vec<T> t, t_p;
      pair_element(s, kShared, load<T>(x0 + k + v, count...), load<T>(tile.n1 + v),
                   load<T>(tile.n2 + v), t, t_p);
      const auto put = [&](auto* to, Vec<T> value) __attribute__((always_inline)) {
        if constexpr (kStreamed && sizeof...(count) == 0) {
          stream<T>(to + k + v, value);
        } else {
          store<T>(to + k + v, value, count...);
        }
      };
      put(x_t, t);
      put(x_tp, t_p);
    });
  }
}

// Elements [begin, end) of sample b, begin a multiple of kTile, in a contiguous layout.
template <typename D>
void pair_row(const PairRows<D>& in, int64_t b, int64_t begin, int64_t end, bool streamed) {
  if (in.shared)
    return streamed ? row<true, true>(in, b, begin, end) : row<true, false>(in, b, begin, end);
  return streamed ? row<false, true>(in, b, begin, end) : row<false, false>(in, b, begin, end);
}

template <typename T, typename S>
TDKERN_INLINE T widen_one(S value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
  } else {
    return static_cast<T>(value);
  }
}
template <typename S, typename T>
TDKERN_INLINE S narrow_one(T value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    return {static_cast<uint16_t>(value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
                                                 : 0x7fc0)};
  } else {
    return static_cast<S>(value);
  }
}

// The Philox calls [begin, end), `calls` a sample, for any layout and for samples that are smaller
// than a tile.
template <typename D>
void pair_calls(const PairRows<D>& in, int64_t begin, int64_t end, int64_t calls) {
  using T = typename PairRows<D>::T;
  const uint64_t key = in.key(), offset = in.counter();
  Tile<T> tile = {};
  for (int64_t first = begin; first < end; first += kCalls) {
    const int count = static_cast<int>(std::min<int64_t>(kCalls, end - first));
    for (int lane = 0; lane < kCalls; ++lane) {
      tile.block[lane] = static_cast<uint32_t>((first + call_of(lane)) % calls);
      tile.sample[lane] = in.word((first + call_of(lane)) / calls);
    }
    tile.draw_both(offset, key, in.shared);
    PairSample<T> s = {};
    int64_t b = first / calls, k = 4 * (first % calls);
    for (int call = 0; call < count; ++call, k += 4) {
      if (k >= in.n) k = 0, ++b;
      if (call == 0 || k == 0) s = in.sample(b);
      int64_t inner = k % in.plane, outer = k / in.plane;
      for (int w = 0; w < 4 && k + w < in.n; ++w) {
        const int64_t at = inner * in.step + outer;
        T t, t_p;
        pair_element(s, in.shared, widen_one<T>(in.x0.data[b * in.x0.stride + at]),
                     tile.n1[4 * call + w], tile.n2[4 * call + w], t, t_p);
        in.x_t.data[b * in.x_t.stride + at] = narrow_one<D>(t);
        in.x_tp.data[b * in.x_tp.stride + at] = narrow_one<D>(t_p);
        if (++inner == in.plane) inner = 0, ++outer;
      }
    }
  }
}

#define TDKERN_PAIR(D)                                                            \
  template void pair_row<D>(const PairRows<D>&, int64_t, int64_t, int64_t, bool); \
  template void pair_calls<D>(const PairRows<D>&, int64_t, int64_t, int64_t);
TDKERN_PAIR(float)
TDKERN_PAIR(double)
TDKERN_PAIR(BFloat16)
TDKERN_PAIR(Half)

}  // namespace TDKERN_ISA

#if defined(TDKERN_LAUNCHER)
TDKERN_EACH_ISA(template <typename D>
                void pair_row(const PairRows<D>&, int64_t, int64_t, int64_t, bool);
                template <typename D>
                void pair_calls(const PairRows<D>&, int64_t, int64_t, int64_t);)

namespace {

constexpr int64_t kChunk = 8192;   // elements of a task
constexpr int64_t kGrain = 16384;  // elements worth a thread

template <typename D>
void each_row(const PairRows<D>& in) {
  const auto kernel = TDKERN_PICK(pair_row<D>);
  const auto aligned = [](const Rows<D>& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % 64 == 0 &&
           rows.stride * static_cast<int64_t>(sizeof(D)) % 64 == 0;
  };
  const bool streamed = in.batch * in.n * static_cast<int64_t>(sizeof(D)) >= kNonTemporalBytes &&
                        aligned(in.x_t) && aligned(in.x_tp);
  const int64_t chunks = (in.n + kChunk - 1) / kChunk;
  torch::stable::parallel_for(
      0, in.batch * chunks, std::max<int64_t>(1, kGrain / std::min(in.n, kChunk)),
      [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t from = task % chunks * kChunk;
          kernel(in, task / chunks, from, std::min(in.n, from + kChunk), streamed);
        }
        fence();
      });
}

template <typename D>
void each_call(const PairRows<D>& in) {
  const auto kernel = TDKERN_PICK(pair_calls<D>);
  const int64_t calls = (in.n + 3) / 4;
  torch::stable::parallel_for(0, in.batch * calls, kGrain / 4,
                              [&](int64_t begin, int64_t end) { kernel(in, begin, end, calls); });
}

PairTensors noise_pair(Tensor x0,
                       Tensor alpha,
                       Tensor sigma,
                       Tensor alpha_p,
                       Tensor sigma_p,
                       bool shared,
                       int64_t seed,
                       std::optional<Tensor> seed_at,
                       int64_t offset,
                       std::optional<Tensor> offset_at,
                       int64_t first_sample) {
  return noise_pair_with<BFloat16, Half>(x0, alpha, sigma, alpha_p, sigma_p, shared, seed, seed_at,
                                         offset, offset_at, first_sample, [](const auto& view) {
                                           if (view.step == 1 && view.n >= kTile)
                                             return each_row(view);
                                           each_call(view);
                                         });
}

}  // namespace
#endif  // TDKERN_LAUNCHER

}  // namespace tdkern

#if defined(TDKERN_LAUNCHER)
STABLE_TORCH_LIBRARY_IMPL(tdkern, CPU, m) {
  m.impl("noise_pair.cpp", TORCH_BOX(&tdkern::noise_pair));
}
#endif
