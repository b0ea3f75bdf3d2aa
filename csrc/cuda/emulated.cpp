// The kernels of gather_gemm_impl.h on a CPU, for tests: one warp of a block at a time, from one barrier to the next, in
// an order that is drawn anew at each barrier. So a warp is as far ahead of the others as the barriers let it be, and a
// barrier that is missing shows in the result.
//
// A copy fills its place with NaN when it is issued and with data when its warp waits for it, so a wait that is missing,
// and a stage that is filled while it is still read, show, too. ldmatrix and mma.sync do what the PTX manual says (ISA
// 8.0, sections 9.7.13.4.8 and 9.7.13.5.8) of all 32 lanes of a warp.
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "gather_gemm_impl.h"

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct BFloat16 {
  static float widen(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
  static uint16_t narrow(float x) {
    if (x != x) return 0x7fc0;
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  static float widen(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
  }
  static uint16_t narrow(float x) {
    if (x != x) return 0x7e00;
    const uint16_t sign = bits_of(x) >> 31 << 15;
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < std::ldexp(1.0f, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // in [.5, 1); nearbyint may carry into the exponent
    return static_cast<uint16_t>(sign |
                                 (((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(fraction, 11))) - 1024));
  }
};

int skipped_line = 0;  // of a barrier in gather_gemm_impl.h that does nothing, to see that it is missed

// Lets one warp run at a time: a drawn one of those that have not reached the barrier; at the barrier, of all.
class Turns {
 public:
  explicit Turns(int warps, int seed) : running_(warps), random_(seed) {
    for (int warp = 0; warp < warps; ++warp) ready_.push_back(warp);
    draw();
  }
  void begin(int warp) {
    std::unique_lock<std::mutex> lock(mutex_);
    wait(lock, warp);
  }
  void barrier(int warp) {
    std::unique_lock<std::mutex> lock(mutex_);
    arrived_.push_back(warp);
    draw();
    wait(lock, warp);
  }
  void end() {
    std::unique_lock<std::mutex> lock(mutex_);
    --running_;
    draw();
  }

 private:
  void wait(std::unique_lock<std::mutex>& lock, int warp) {
    changed_.wait(lock, [&] { return turn_ == warp; });
  }
  void draw() {
    if (ready_.empty() && int(arrived_.size()) == running_) ready_.swap(arrived_);
    turn_ = -1;
    if (!ready_.empty()) {
      const size_t drawn = random_() % ready_.size();
      turn_ = ready_[drawn];
      ready_.erase(ready_.begin() + drawn);
    }
    changed_.notify_all();
  }

  int running_, turn_ = -1;
  std::vector<int> ready_, arrived_;
  std::minstd_rand random_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A block as one of its warps sees it.
template <class T, class Type>
struct EmulatedBlock {
  template <class V, int N>
  struct Registers {
    V lanes[32][N] = {};
    V* of(int lane) { return lanes[lane]; }
  };
  template <class V>
  struct PerThread {
    std::vector<V> all = std::vector<V>(T::kThreads);
    V& operator[](int thread) { return all[thread]; }
  };
  template <class V>
  using PerWarp = PerThread<V>;
  struct Copy {
    int place;
    const uint16_t* from;
    bool wanted;
  };

  char* shared;
  int warp;
  Turns& turns;
  std::vector<std::vector<Copy>> groups = {{}};  // not waited for; the last one is still open

  EmulatedBlock(char* shared, int warp, Turns& turns) : shared(shared), warp(warp), turns(turns) {}

  template <class F>
  void each_thread(F run) {
    for (int lane = 0; lane < 32; ++lane) run(32 * warp + lane);
  }
  template <class F>
  void each_warp(F run) {
    run(warp);
  }
  void sync(int line = __builtin_LINE()) {
    if (line != skipped_line) turns.barrier(warp);
  }

  void copy16(int place, const uint16_t* from, bool wanted) {
    std::memset(shared + place, 0xff, 16);
    groups.back().push_back({place, from, wanted});
  }
  void commit(int thread) {
    if (thread % 32 == 31) groups.emplace_back();
  }
  template <int N>
  void wait_for_all_but() {
    while (groups.size() > N + 1) {
      for (const Copy& copy : groups.front()) {
        if (copy.wanted)
          std::memcpy(shared + copy.place, copy.from, 16);
        else
          std::memset(shared + copy.place, 0, 16);
      }
      groups.erase(groups.begin());
    }
  }

  template <int N, class F>
  void load_matrices(Registers<uint32_t, N>& to, int at, F place) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&to.lanes[lane][at + matrix], shared + place(8 * matrix + lane / 4) + lane % 4 * 4, 4);
  }
  static float element(const uint32_t* registers, int index) {
    return Type::widen(static_cast<uint16_t>(registers[index / 2] >> (index % 2 * 16)));
  }
  template <int C, int B>
  void multiply_add(Registers<float, C>& sums, int c, const Registers<uint32_t, 4>& x, const Registers<uint32_t, B>& w,
                    int b) {
    float left[16][16], right[16][8];  // [row][k], [k][column]
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + (i / 2 % 2) * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
        left[row][k] = element(x.lanes[lane], i);
        if (i < 4) right[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = element(w.lanes[lane] + b, i);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k)
          sums.lanes[lane][c + i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
  }
};

template <class T, class Type>
void emulate_program(const GatherGemm& g, int program) {
  constexpr int kWarps = T::kThreads / 32;
  std::vector<char> memory(T::kSharedBytes, char(0xff));
  Turns turns(kWarps, program + 1);
  std::vector<std::thread> warps;
  for (int warp = 0; warp < kWarps; ++warp)
    warps.emplace_back([&, warp] {
      turns.begin(warp);
      EmulatedBlock<T, Type> block(memory.data(), warp, turns);
      gather_gemm<T, Type>(block, g, program);
      turns.end();
    });
  for (std::thread& warp : warps) warp.join();
}

template <class T>
void emulate(const GatherGemm& g, bool bfloat16) {
  for (int program = 0; program < g.num_tiles * g.pixel_tiles; ++program)
    bfloat16 ? emulate_program<T, BFloat16>(g, program) : emulate_program<T, Float16>(g, program);
}

}  // namespace

// Barriers of this line of gather_gemm_impl.h do nothing from now on; 0: all hold.
extern "C" void emulate_without_barrier(int line) { skipped_line = line; }

// 0, or 1 where no kernel has this tile.
extern "C" int emulate_gather_gemm(const GatherGemm* g, int bfloat16, int bm, int bn, int bk) {
#define SPARSEKD_EMULATE(BM, BN, BK, M, N, S) \
  if (bm == BM && bn == BN && bk == BK) return emulate<Tile<BM, BN, BK, M, N, S>>(*g, bfloat16 != 0), 0;
  SPARSEKD_TILES(SPARSEKD_EMULATE, 16)
  SPARSEKD_TILES(SPARSEKD_EMULATE, 32)
#undef SPARSEKD_EMULATE
  return 1;
}
