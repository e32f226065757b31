#include "csrc/parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>

namespace edgeclip {
namespace {

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
    const int64_t machine = std::max(1u, std::thread::hardware_concurrency());
    try {
      for (; workers_ < std::min(wanted, machine - 1); ++workers_) {
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

void run_parts(int64_t parts, const std::function<void(int64_t)>& run) {
  Job job{run, parts};
  pool().run(job);
}

}  // namespace edgeclip
