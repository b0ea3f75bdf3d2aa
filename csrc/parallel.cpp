// Threads and per-thread memory: the only file that knows how threads are made, wait and share a loop.
#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparsekd {

namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[kScratchSlots];

// ---- Waiting: a short spin, then sleep

using Word = std::atomic<uint32_t>;

using Clock = std::chrono::steady_clock;

// Long enough for what a network does between two loops. A thread that spins on a busy machine only uses up the time
// that the thread it waits for may need.
constexpr std::chrono::microseconds kSpin{50};

// Sleeps while `word` is `value`; may return without a reason.
void sleep_while(Word& word, uint32_t value) {
#ifdef __linux__
  // Not word.wait(value), which yields before it sleeps: on a busy machine a yield lasts a time slice, in which the
  // thread that is waited for cannot move to this core.
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}

// Wakes up to `count` threads that sleep on `word`, which may be gone by then.
void wake(Word* word, int count) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
  count == 1 ? word->notify_one() : word->notify_all();
#endif
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` does nothing on most cores
#endif
}

// Spins until `done()`, but not for long; returns whether it is.
template <class Done>
bool spin_until(const Done& done) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

thread_local bool inside_loop = false;

// ---- A loop that several threads share, wherever they come from

class Loop {
 public:
  Loop(int workers, int64_t items, ParallelBody body, void* context)
      : places(workers - 1), shares_(std::min(workers, kShares)), items_(items), body_(body), context_(context) {
    for (int i = 0; i < shares_; ++i) next_[i].store(begin(i), std::memory_order_relaxed);
  }

  // Runs items until none is left that nobody has claimed. A worker begins with its share, so that in the next loop over
  // the same rows it finds in its cache what it wrote.
  void work(int worker) noexcept {
    inside_loop = true;
    try {
      bool first = true;
      for (int i = 0; i < shares_; ++i) {
        const int share = (worker + i) % shares_;
        for (int64_t item; (item = next_[share].fetch_add(1, std::memory_order_relaxed)) < begin(share + 1);
             first = false)
          body_(context_, item, first);
      }
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    inside_loop = false;
  }

  void join() { state_.fetch_add(1, std::memory_order_relaxed); }

  // The last access of a helper: when it was the last one, the loop may be gone before the caller is woken.
  void leave() {
    Word* const state = &state_;
    if (state->fetch_sub(1, std::memory_order_acq_rel) == (kCallerSleeps | 1)) wake(state, 1);
  }

  // Waits for those who joined, when nobody can join any more.
  void wait() {
    const auto left = [&] { return (state_.load(std::memory_order_acquire) & ~kCallerSleeps) == 0; };
    if (!spin_until(left)) {
      uint32_t now = state_.fetch_or(kCallerSleeps, std::memory_order_acq_rel) | kCallerSleeps;
      for (; now != kCallerSleeps; now = state_.load(std::memory_order_acquire)) sleep_while(state_, now);
    }
  }

  // Throws what the first failed item threw.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

  // Of the pool, under its mutex: how many more may join, and the next loop of its list.
  int places;
  Loop* next = nullptr;

 private:
  static constexpr int kShares = 64;  // of more workers than that, two or three begin in the same share
  static constexpr uint32_t kCallerSleeps = 1u << 31;

  int64_t begin(int share) const { return items_ * share / shares_; }

  std::atomic<int64_t> next_[kShares];  // the next item of every share
  Word state_{0};                       // helpers that may be running an item, and whether the caller sleeps
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  const int shares_;
  const int64_t items_;
  const ParallelBody body_;
  void* const context_;
};

// ---- Threads that help the callers

// Threads are started when a loop first asks for so many and stay; between loops they sleep. A caller takes part in its
// loop, claims items like all others and waits only for helpers that have joined: one that the machine is too busy to
// run costs nothing.
class Pool {
 public:
  void run(Loop& loop, int workers) {
    int asleep;
    {
      std::lock_guard lock(mutex_);
      for (; helpers_ < workers - 1; ++helpers_) start(helpers_ + 1);
      loop.next = open_;
      open_ = &loop;
      free_places_.fetch_add(loop.places);
      posted_.fetch_add(1);
    }
    if ((asleep = sleepers_.load()) > 0) wake(&posted_, std::min(asleep, workers - 1));
    loop.work(0);
    {
      std::lock_guard lock(mutex_);
      Loop** link = &open_;
      while (*link != &loop) link = &(*link)->next;
      *link = loop.next;
      free_places_.fetch_sub(loop.places);
    }
    loop.wait();
  }

 private:
  // Throws std::system_error.
  void start(int number) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads of whoever uses the library
    try {
      std::thread([this, number] { help(number); }).detach();
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void help(int number) {
    for (;;) {
      const uint32_t seen = posted_.load();
      if (Loop* const loop = join()) {
        loop->work(number);
        loop->leave();
      } else if (!spin_until([&] { return posted_.load(std::memory_order_relaxed) != seen; })) {
        sleepers_.fetch_add(1);
        sleep_while(posted_, seen);  // returns at once where a loop was posted meanwhile
        sleepers_.fetch_sub(1);
      }
    }
  }

  // A loop that has a place, or null.
  Loop* join() {
    if (free_places_.load() == 0) return nullptr;
    std::lock_guard lock(mutex_);
    for (Loop* loop = open_; loop != nullptr; loop = loop->next)
      if (loop->places > 0) {
        --loop->places;
        free_places_.fetch_sub(1);
        loop->join();
        return loop;
      }
    return nullptr;
  }

  std::mutex mutex_;
  Loop* open_ = nullptr;
  int helpers_ = 0;
  std::atomic<int> free_places_{0}, sleepers_{0};
  Word posted_{0};  // how many loops there have been
};

// Never destroyed: its threads run until the process ends.
alignas(Pool) unsigned char pool_memory[sizeof(Pool)];

Pool& pool() {
  static Pool* const only = new (pool_memory) Pool;
  return *only;
}

// A child of fork has none of the threads: it starts with a new pool, and leaves alone an OpenMP that would wait for its
// own.
bool forked = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  inside_loop = false;
  new (&pool()) Pool;
});

// ---- OpenMP's threads, which torch's operators share

#ifdef _OPENMP

// OpenMP's threads run on for milliseconds behind every loop, so that the next one finds them awake. Beside torch's
// operators nothing is as fast as using the same threads: others would have to share the cores with them.
// On a busy machine it is the other way round. Every loop ends when all of its threads have arrived, also those that the
// machine has not run yet, and whoever waits for them uses up the time slice of its core.
class OpenMp {
 public:
  static void run(Loop& loop, int workers) {
    clockid_t clock{};
#pragma omp parallel num_threads(workers)
    {
      if (omp_get_thread_num() == 1) pthread_getcpuclockid(pthread_self(), &clock);
      loop.work(omp_get_thread_num());
    }
    mine.clock = clock;
    mine.known = true;
  }

  // Whether the thread that calls would rather use OpenMP's threads for a network: where they are running anyway.
  static bool awake(int workers) {
    const Clock::time_point now = Clock::now();
    if (!mine.known) {
      Loop nothing(workers, 0, nullptr, nullptr);
      run(nothing, workers);
      mine.used = now;
    }
    // Whether they would still be running had the network before this one not used them is seen when that is over.
    if (now - mine.used < kRunOn) return now < mine.until;
    if (!running()) return false;
    mine.until = now + kStay;
    return true;
  }

  static void used() { mine.used = Clock::now(); }

 private:
  static constexpr std::chrono::milliseconds kRunOn{20}, kStay{500};

  struct Mine {
    bool known = false;
    clockid_t clock{};                // of the CPU time of a thread of the team
    Clock::time_point used, until{};  // by a network: last, and without another look
  };
  static thread_local Mine mine;

  static std::chrono::nanoseconds cpu_time() {
    timespec time;
    if (clock_gettime(mine.clock, &time) != 0) return std::chrono::nanoseconds{0};  // the thread has ended
    return std::chrono::seconds{time.tv_sec} + std::chrono::nanoseconds{time.tv_nsec};
  }

  static bool running() {
    const Clock::time_point begin = Clock::now();
    const auto before = cpu_time();
    while (Clock::now() - begin < std::chrono::microseconds{2}) relax();
    return 2 * (cpu_time() - before) > std::chrono::microseconds{2};
  }
};

thread_local OpenMp::Mine OpenMp::mine;

#endif

thread_local bool own_threads = false;

}  // namespace

NetworkLoops::NetworkLoops([[maybe_unused]] int threads) : before_(own_threads) {
  own_threads = true;
#ifdef _OPENMP
  if (threads > 1 && !before_ && !inside_loop && !forked) own_threads = !OpenMp::awake(threads);
#endif
}

NetworkLoops::~NetworkLoops() {
#ifdef _OPENMP
  if (!own_threads) OpenMp::used();
#endif
  own_threads = before_;
}

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

void parallel_for(int threads, int64_t items, ParallelBody body, void* context) {
  const int workers = static_cast<int>(std::min<int64_t>(threads, items));
  if (workers <= 1 || inside_loop) {
    for (int64_t i = 0; i < items; ++i) body(context, i, i == 0);
    return;
  }
  Loop loop(workers, items, body, context);
#ifdef _OPENMP
  if (!own_threads && !forked)
    OpenMp::run(loop, workers);
  else
#endif
    pool().run(loop, workers);
  loop.rethrow();
}

}  // namespace sparsekd
