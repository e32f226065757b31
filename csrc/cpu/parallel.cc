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

std::atomic<int64_t> chosen_cores{0};  // 0: those of the affinity

int64_t affinity_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif  // or a machine of more cores than a cpu_set_t holds
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Job {
  const std::function<void(int64_t)>& run;
  int64_t parts;
  int64_t taken = 0;
  int64_t done = 0;
};

// Threads that wait for parts of jobs. To start one for each call is slow, and on a busy machine a
// thread that is new waits for its turn while one that wakes up is let in.
class Pool {
 public:
  void run(Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    start_workers(job.parts - 1);
    jobs_.push_back(&job);
    work_.notify_all();
    while (job.taken < job.parts) work(job, lock);
    done_.wait(lock, [&] { return job.done == job.parts; });
  }

 private:
  void start_workers(int64_t wanted) {
    const int64_t most = std::min(wanted, usable_cores() - 1);
    try {
      for (; workers_ < most; ++workers_) {
        std::thread([this] { wait_for_work(); }).detach();
      }
    } catch (const std::system_error&) {
      // The system has no thread left to give: those that are there, and the caller, do it all.
    }
  }

  [[noreturn]] void wait_for_work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      work_.wait(lock, [&] { return !jobs_.empty(); });
      work(*jobs_.front(), lock);
    }
  }

  // Does one part of the job, whose last part to be taken takes it from the queue.
  void work(Job& job, std::unique_lock<std::mutex>& lock) {
    const int64_t part = job.taken++;
    if (job.taken == job.parts) jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    lock.unlock();
    job.run(part);
    lock.lock();
    if (++job.done == job.parts) done_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job*> jobs_;
  int64_t workers_ = 0;
};

// Never destroyed, since its threads wait in it until the process ends. A process that is forked
// has none of the threads, and makes a pool of its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });
  static_cast<void>(registered);
  Pool* found = current.load();
  if (found != nullptr) return *found;
  Pool* made = new Pool;
  if (current.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

int64_t usable_cores() {
  const int64_t chosen = chosen_cores.load(std::memory_order_relaxed);
  return chosen > 0 ? chosen : affinity_cores();
}

void set_usable_cores(int64_t cores) { chosen_cores.store(cores, std::memory_order_relaxed); }

void run_parts(int64_t parts, const std::function<void(int64_t)>& run) {
  Job job{run, parts};
  pool().run(job);
}

}  // namespace edgeclip
