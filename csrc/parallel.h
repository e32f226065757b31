#ifndef EDGECLIP_PARALLEL_H_
#define EDGECLIP_PARALLEL_H_

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <vector>

namespace edgeclip {

// The cores that this process may use: those of its affinity, or what set_usable_cores said last.
int64_t usable_cores();
void set_usable_cores(int64_t cores);

// One thread for each usable core, but none with less than `work_per_thread` to do.
inline int64_t automatic_threads(double work, double work_per_thread) {
  if (work < 2 * work_per_thread) return 1;  // asking for the affinity is a system call
  return static_cast<int64_t>(
      std::min(work / work_per_thread, static_cast<double>(usable_cores())));
}

// Calls run(part) for each of the `parts`, on this thread and on others that are kept for it, and
// returns when all are done. `run` must not throw.
void run_parts(int64_t parts, const std::function<void(int64_t)>& run);

// Calls body(begin, end) on contiguous parts of [0, count), `threads` of them, and returns when all
// are done. The first exception of the lowest part is rethrown.
template <typename Body>
void parallel_for(int64_t count, int64_t threads, const Body& body) {
  const int64_t parts = std::min(threads, count);
  if (parts <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  std::vector<std::exception_ptr> errors(parts);
  run_parts(parts, [&](int64_t part) {
    // Not count * part / parts, which could overflow.
    const int64_t size = count / parts, extra = count % parts;
    const int64_t begin = part * size + std::min(part, extra);
    try {
      body(begin, begin + size + (part < extra ? 1 : 0));
    } catch (...) {
      errors[part] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace edgeclip

#endif  // EDGECLIP_PARALLEL_H_
