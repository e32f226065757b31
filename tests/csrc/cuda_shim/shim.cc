#include <cuda_runtime.h>
#include <pthread.h>
#include <semaphore.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

thread_local dim3 threadIdx, blockIdx, gridDim;

namespace shim {

int skipped_barrier = -1;

namespace {

constexpr unsigned kBlocksAtOnce = 2;  // so that races between blocks can occur

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  Barrier barrier;
  uint64_t exchanged[2][kWarpSize] = {};  // alternating rows: one barrier per exchange is enough
};

// State shared by the threads of a block. The same threads run several blocks in succession.
struct Block {
  Block(unsigned threads, size_t shared_bytes) : barrier(threads), shared_size(shared_bytes) {
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      warps.push_back(std::make_unique<Warp>(std::min<unsigned>(threads - first, kWarpSize)));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  size_t shared_size;
  std::unique_ptr<unsigned char[]> shared;
};

thread_local Block* block = nullptr;
thread_local int barriers_passed = 0;
thread_local int row = 0;  // row of the warp's exchange buffer to use next

Warp& warp() { return *block->warps[threadIdx.x / kWarpSize]; }

void run_blocks(Block& shared_block, unsigned thread, unsigned first, unsigned step, dim3 grid,
                const std::function<void()>& kernel) {
  block = &shared_block;
  threadIdx = dim3(thread, 0, 0);
  gridDim = grid;
  row = 0;
  for (uint64_t i = first; i < uint64_t{grid.x} * grid.y; i += step) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x), 0);
    barriers_passed = 0;
    if (thread == 0) {  // exactly the requested size, filled with garbage
      block->shared.reset(new unsigned char[block->shared_size]);
      std::fill_n(block->shared.get(), block->shared_size, 0xff);
    }
    block->barrier.wait();
    kernel();
    block->barrier.wait();
  }
}

// Threads reused by all launches: starting hundreds takes longer than their work.
class ThreadPool {
 public:
  void run(unsigned count, const std::function<void(unsigned)>& work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (workers_.size() < count) {
      workers_.push_back(std::make_unique<Worker>());
      std::thread([this, worker = workers_.back().get()] { worker->serve(done_); }).detach();
    }
    for (unsigned i = 0; i < count; ++i) workers_[i]->begin(work, i);
    for (unsigned i = 0; i < count; ++i) done_.wait();
  }

 private:
  class Semaphore {
   public:
    Semaphore() { sem_init(&semaphore_, 0, 0); }
    void post() { sem_post(&semaphore_); }
    void wait() {
      while (sem_wait(&semaphore_) != 0) {  // interrupted by a signal
      }
    }

   private:
    sem_t semaphore_;
  };

  class Worker {
   public:
    void begin(const std::function<void(unsigned)>& work, unsigned i) {
      work_ = &work;
      i_ = i;
      begin_.post();
    }
    void serve(Semaphore& done) {
      for (;;) {
        begin_.wait();
        (*work_)(i_);
        done.post();
      }
    }

   private:
    Semaphore begin_;
    const std::function<void(unsigned)>* work_ = nullptr;
    unsigned i_ = 0;
  };

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Semaphore done_;
};

ThreadPool& pool() {
  static ThreadPool* const instance = new ThreadPool;  // never destroyed: its threads keep waiting
  return *instance;
}

}  // namespace

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned at_once = size.x > 512 ? 1 : std::min(grid.x * grid.y, kBlocksAtOnce);
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < at_once; ++i) {
    blocks.push_back(std::make_unique<Block>(size.x, shared_bytes));
  }
  pool().run(at_once * size.x, [&](unsigned i) {
    run_blocks(*blocks[i / size.x], i % size.x, i / size.x, at_once, grid, kernel);
  });
}

int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

uint64_t exchange(uint64_t bits, int source) {
  uint64_t* const exchanged = warp().exchanged[row];
  row ^= 1;
  exchanged[lane()] = bits;
  warp().barrier.wait();
  return exchanged[source];
}

}  // namespace shim

void* shim_shared_memory() { return shim::block->shared.get(); }

void __syncthreads() {
  if (shim::barriers_passed++ != shim::skipped_barrier) shim::block->barrier.wait();
}

void __syncwarp() { shim::warp().barrier.wait(); }
