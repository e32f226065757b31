#include "csrc/parallel.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace edgeclip {
namespace {

std::atomic<int64_t> requested_cores{0};  // 0: use the affinity

int64_t affinity_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  // Also reached on a machine with more cores than a cpu_set_t holds.
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Job {
  const std::function<void(int64_t)>& run;
  int64_t tasks;
  int64_t started = 0;
  int64_t finished = 0;
};

// A thread pool. Starting threads for each call is slow, and on a busy machine a new thread waits
// longer to be scheduled than one that wakes up.
class Pool {
 public:
  void run(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    start_workers(job.tasks - 1);
    jobs_.push_back(&job);
    work_.notify_all();
    while (job.started < job.tasks) run_task(job, lock);
    finished_.wait(lock, [&] { return job.finished == job.tasks; });
  }

 private:
  void start_workers(int64_t requested) {
    const int64_t limit = std::min(requested, usable_cores() - 1);
    try {
      for (; workers_ < limit; ++workers_) {
        std::thread([this] { wait_for_work(); }).detach();
      }
    } catch (const std::system_error&) {
      // The system's thread limit is reached: the existing workers and the caller run all tasks.
    }
  }

  [[noreturn]] void wait_for_work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      work_.wait(lock, [&] { return !jobs_.empty(); });
      run_task(*jobs_.front(), lock);
    }
  }

  // Runs the next task of a job. Starting its last task removes the job from the queue.
  void run_task(Job& job, std::unique_lock<std::mutex>& lock) {
    const int64_t task = job.started++;
    if (job.started == job.tasks) jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    lock.unlock();
    job.run(task);
    lock.lock();
    if (++job.finished == job.tasks) finished_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable work_, finished_;
  std::deque<Job*> jobs_;
  int64_t workers_ = 0;
};

// Never destroyed, since its threads wait in it until the process ends. A forked process has none
// of those threads, so it creates its own pool.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });
  static_cast<void>(registered);
  Pool* existing = current.load();
  if (existing != nullptr) return *existing;
  Pool* created = new Pool;
  if (current.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

int64_t usable_cores() {
  const int64_t requested = requested_cores.load(std::memory_order_relaxed);
  return requested > 0 ? requested : affinity_cores();
}

void set_usable_cores(int64_t cores) { requested_cores.store(cores, std::memory_order_relaxed); }

void run_tasks(int64_t tasks, const std::function<void(int64_t)>& run) {
  Job job{run, tasks};
  pool().run(job);
}

}  // namespace edgeclip
