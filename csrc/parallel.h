#ifndef EDGECLIP_PARALLEL_H_
#define EDGECLIP_PARALLEL_H_

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <vector>

namespace edgeclip {

// Returns the cores this process may use: the value of set_usable_cores, or the CPU affinity.
int64_t usable_cores();
void set_usable_cores(int64_t cores);

// Returns one thread per usable core, but no more than give each `work_per_thread` of work.
inline int64_t automatic_threads(double work, double work_per_thread) {
  if (work < 2 * work_per_thread) return 1;  // avoids the system call for the affinity
  return static_cast<int64_t>(
      std::min(work / work_per_thread, static_cast<double>(usable_cores())));
}

// Calls run(task) for each task in [0, tasks), on this thread and a thread pool, and returns when
// all are done. `run` must not throw.
void run_tasks(int64_t tasks, const std::function<void(int64_t)>& run);

// Calls body(begin, end) on `threads` contiguous ranges of [0, count), and returns when all are
// done. Rethrows the exception of the first range that threw.
template <typename Body>
void parallel_for(int64_t count, int64_t threads, const Body& body) {
  const int64_t tasks = std::min(threads, count);
  if (tasks <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  std::vector<std::exception_ptr> errors(tasks);
  run_tasks(tasks, [&](int64_t task) {
    // count * task / tasks could overflow.
    const int64_t size = count / tasks, extra = count % tasks;
    const int64_t begin = task * size + std::min(task, extra);
    try {
      body(begin, begin + size + (task < extra ? 1 : 0));
    } catch (...) {
      errors[task] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace edgeclip

#endif  // EDGECLIP_PARALLEL_H_
