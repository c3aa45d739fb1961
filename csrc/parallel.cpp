#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace hasten {
namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Job {
    int64_t items, grain;
    void (*run)(void*, int64_t, int64_t);
    void* context;
};

// One job at a time. A worker may take part in a job only between `inside++` and `inside--` and
// only while `open` is set; the caller clears `open`, waits until nobody is inside, and returns.
// A worker that comes late finds the job closed, so nobody ever waits for a sleeping thread.
class Pool {
  public:
    void ensure_workers(int wanted) {
        for (; started_ < wanted; started_++) std::thread([this, id = started_] { work(id); }).detach();
    }

    bool try_run(const Job& job, int helpers) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        ensure_workers(helpers);
        job_ = job;
        helpers_.store(helpers);
        next_.store(0);
        open_.store(true);
        ticket_.fetch_add(1);
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        take_items();
        open_.store(false);
        // a helper that lost its core to another process needs one to finish
        for (int spins = 0; inside_.load() > 0; spins++)
            spins < 4096 ? relax() : std::this_thread::yield();
        return true;
    }

  private:
    void take_items() {
        for (;;) {
            int64_t begin = next_.fetch_add(job_.grain);
            if (begin >= job_.items) return;
            int64_t end = begin + job_.grain < job_.items ? begin + job_.grain : job_.items;
            job_.run(job_.context, begin, end);
        }
    }

    void work(int id) {
        uint64_t seen = 0;
        for (;;) {
            wait_for_ticket(seen);
            seen = ticket_.load();
            inside_.fetch_add(1);
            if (open_.load() && id < helpers_.load()) take_items();
            inside_.fetch_sub(1);
        }
    }

    // spin for a while, since the next kernel usually follows at once, then sleep
    void wait_for_ticket(uint64_t seen) {
        using Clock = std::chrono::steady_clock;
        const auto until = Clock::now() + std::chrono::microseconds(200);
        do {
            for (int i = 0; i < 64; i++) {
                if (ticket_.load() != seen) return;
                relax();
            }
        } while (Clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
        asleep_.fetch_sub(1);
    }

    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    Job job_{};
    std::atomic<int64_t> next_{0};
    std::atomic<bool> open_{false};
    std::atomic<int> helpers_{0}, inside_{0}, asleep_{0};
    std::atomic<uint64_t> ticket_{0};
    int started_ = 0;
};

// Never destroyed: workers outlive main(). A forked child has no workers and starts a new pool.
Pool* pool = nullptr;

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    });
    return *pool;
}

int default_threads() {
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        int threads = std::atoi(text);
        if (threads > 0) return threads;
    }
    unsigned cores = std::thread::hardware_concurrency();
    return cores ? int(cores) : 1;
}

std::atomic<int>& threads() {
    static std::atomic<int> value{default_threads()};
    return value;
}

struct Scratch {
    void* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
};

}  // namespace

int num_threads() { return threads().load(); }
void set_num_threads(int value) { threads().store(value < 1 ? 1 : value); }

void run_parallel(int64_t items, int64_t grain, void (*run)(void*, int64_t, int64_t),
                  void* context) {
    int helpers = num_threads() - 1;
    const int64_t ranges = (items + grain - 1) / grain;
    if (helpers > ranges - 1) helpers = int(ranges - 1);
    if (helpers < 1 || !the_pool().try_run({items, grain, run, context}, helpers)) {
        run(context, 0, items);
    }
}

void* scratch(size_t bytes) {
    thread_local Scratch mine;
    if (mine.size < bytes) {
        std::free(mine.data);
        mine.size = (bytes + 4095) / 4096 * 4096;
        mine.data = std::aligned_alloc(64, mine.size);
        if (!mine.data) std::abort();
    }
    return mine.data;
}

}  // namespace hasten
