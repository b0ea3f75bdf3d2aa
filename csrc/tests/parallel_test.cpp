// Loops over threads (parallel.h): every item once, whoever calls, from a child of fork, and errors that come out. Under a
// thread sanitizer, so without OpenMP: all loops run on the threads of parallel.cpp.
#include "../parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../parallel_impl.h"

namespace {

std::atomic<int> failures{0};

void expect(bool fine, const char* what) {
  if (fine) return;
  fprintf(stderr, "parallel_test: %s\n", what);
  ++failures;
}

// Plain integers: two threads that ran one item, or a caller that did not wait, are a race that the sanitizer sees.
void every_item_once(int threads, int64_t items) {
  std::vector<int> runs(static_cast<size_t>(items));
  parallel(threads, items, [&](int64_t item) { ++runs[static_cast<size_t>(item)]; });
  for (const int count : runs) expect(count == 1, "an item did not run exactly once");
}

void the_first_item_of_each_worker_is_said() {
  std::atomic<int> firsts{0};

  parallel_workers(3, 100, [&](int64_t, bool first) { firsts += first; });
  expect(firsts >= 1 && firsts <= 3, "as many first items as workers");
}

void an_error_comes_out() {
  for (const int threads : {1, 4}) {
    bool thrown = false;
    try {
      parallel(threads, 50, [](int64_t item) {
        if (item == 20) throw std::runtime_error("item 20");
      });
    } catch (const std::runtime_error& error) {
      thrown = strcmp(error.what(), "item 20") == 0;
    }
    expect(thrown, "an item's exception did not reach the caller");
    every_item_once(threads, 50);
  }
}

void loops_inside_of_loops_are_plain() {
  std::vector<std::vector<int>> runs(8, std::vector<int>(16));
  parallel(4, 8, [&](int64_t i) {
    const std::thread::id here = std::this_thread::get_id();
    parallel(4, 16, [&](int64_t j) {
      ++runs[static_cast<size_t>(i)][static_cast<size_t>(j)];
      expect(std::this_thread::get_id() == here, "an inner loop left its thread");
    });
  });
  for (const auto& inner : runs)
    for (const int count : inner) expect(count == 1, "an item of an inner loop did not run exactly once");
}

void many_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i)
    callers.emplace_back([i] {
      const sparsekd::NetworkLoops loops(4);
      for (int round = 0; round < 300; ++round) every_item_once(1 + (i + round) % 5, 1 + round % 23);
    });
  for (std::thread& caller : callers) caller.join();
}

// At most as many threads at a time as were asked for.
void no_more_threads_than_asked() {
  every_item_once(8, 64);  // more of them exist
  std::atomic<int> now{0}, most{0};
  parallel(2, 64, [&](int64_t) {
    const int count = ++now;
    for (int seen = most; count > seen && !most.compare_exchange_weak(seen, count);) continue;
    std::this_thread::yield();
    --now;
  });
  expect(most <= 2, "more threads than were asked for");
}

void sleeping_threads_wake() {
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    every_item_once(3, 9);
  }
}

// The child has none of the threads.
void a_child_of_fork_has_loops() {
  every_item_once(4, 16);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // instead of a test that hangs
    const int before = failures;
    for (int round = 0; round < 20; ++round) every_item_once(4, 16);
    _exit(failures == before ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(child > 0 && status == 0, "loops in a child of fork");
  every_item_once(4, 16);
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 8, 100})
    for (const int64_t items : {0, 1, 2, 7, 64, 1000}) every_item_once(threads, items);
  the_first_item_of_each_worker_is_said();
  an_error_comes_out();
  loops_inside_of_loops_are_plain();
  many_callers();
  no_more_threads_than_asked();
  sleeping_threads_wake();
  a_child_of_fork_has_loops();
  printf("parallel_test: %d wrong\n", failures.load());
  return failures == 0 ? 0 : 1;
}
