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

constexpr unsigned kBlocksAtOnce = 2;  // so that blocks can race with each other

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
  uint64_t given[2][kWarpSize] = {};  // the rows take turns: one barrier per exchange is enough
};

// What the threads of one block share. The threads run one block after another in it.
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
thread_local int turn = 0;

Warp& warp() { return *block->warps[threadIdx.x / kWarpSize]; }

void run_blocks(Block& mine, unsigned thread, unsigned first, unsigned step, dim3 grid,
                const std::function<void()>& kernel) {
  block = &mine;
  threadIdx = dim3(thread, 0, 0);
  gridDim = grid;
  turn = 0;
  for (uint64_t i = first; i < uint64_t{grid.x} * grid.y; i += step) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x), 0);
    barriers_passed = 0;
    if (thread == 0) {  // as much as was asked for, and full of what nobody should read
      mine.shared.reset(new unsigned char[mine.shared_size]);
      std::fill_n(mine.shared.get(), mine.shared_size, 0xff);
    }
    mine.barrier.wait();
    kernel();
    mine.barrier.wait();
  }
}

// Threads for all launches: to start hundreds of them takes longer than what they do.
class Team {
 public:
  void run(unsigned count, const std::function<void(unsigned)>& work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (members_.size() < count) {
      members_.push_back(std::make_unique<Member>());
      std::thread([this, member = members_.back().get()] { member->serve(done_); }).detach();
    }
    for (unsigned i = 0; i < count; ++i) members_[i]->begin(work, i);
    for (unsigned i = 0; i < count; ++i) done_.wait();
  }

 private:
  class Semaphore {
   public:
    Semaphore() { sem_init(&semaphore_, 0, 0); }
    void post() { sem_post(&semaphore_); }
    void wait() {
      while (sem_wait(&semaphore_) != 0) {  // a signal came in between
      }
    }

   private:
    sem_t semaphore_;
  };

  class Member {
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
  std::vector<std::unique_ptr<Member>> members_;
  Semaphore done_;
};

Team& team() {
  static Team* const all = new Team;  // never gone, as its threads end with the process
  return *all;
}

}  // namespace

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned at_once = size.x > 512 ? 1 : std::min(grid.x * grid.y, kBlocksAtOnce);
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < at_once; ++i) {
    blocks.push_back(std::make_unique<Block>(size.x, shared_bytes));
  }
  team().run(at_once * size.x, [&](unsigned i) {
    run_blocks(*blocks[i / size.x], i % size.x, i / size.x, at_once, grid, kernel);
  });
}

int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

uint64_t exchange(uint64_t mine, int from) {
  uint64_t* const given = warp().given[turn];
  turn ^= 1;
  given[lane()] = mine;
  warp().barrier.wait();
  return given[from];
}

}  // namespace shim

void* shim_shared_memory() { return shim::block->shared.get(); }

void __syncthreads() {
  if (shim::barriers_passed++ != shim::skipped_barrier) shim::block->barrier.wait();
}

void __syncwarp() { shim::warp().barrier.wait(); }
