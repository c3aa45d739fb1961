#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "cores.h"

namespace hasten {
namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Job {
    int64_t items, grain;
    int threads;
    void (*run)(void*, int64_t, int64_t);
    void* context;
};

// What belongs to one thread, in a cache line of its own.
struct alignas(64) Share {
    std::atomic<int64_t> next{0};  // of [.., end), ranges of `grain` items are taken from the front
    int64_t end = 0;
    std::atomic<bool> inside{false};
};

// One job at a time. Each thread has a contiguous share of the items, so that it reads memory from
// front to back, and takes it in small ranges; who is done helps the others, so that a thread which
// is slowed down or not there holds up nobody. `state_` is the number of the job and, while it is
// open, how many threads it is for. A worker takes part only between setting and clearing `inside`
// and only while the job is open; the caller closes it, waits until nobody is inside, and returns.
// A worker that comes late finds the job closed, so nobody ever waits for a sleeping thread.
class Pool {
  public:
    bool try_run(Job job) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        if (job.threads > MOST_THREADS) job.threads = MOST_THREADS;
        ensure_workers(job.threads - 1);
        // a caller that has come to the processor of a worker gets it
        const int here = current_processor();
        if (here >= 0 && here < int(taken_.size()) && taken_[here]) place_workers();
        job_ = job;
        const int64_t ranges = (job.items + job.grain - 1) / job.grain;
        for (int i = 0; i < job.threads; i++) {
            const int64_t end = ranges * (i + 1) / job.threads * job.grain;
            shares_[i].next.store(ranges * i / job.threads * job.grain, std::memory_order_relaxed);
            shares_[i].end = end < job.items ? end : job.items;
        }
        number_++;
        state_.store(number_ * STATE_THREADS + uint64_t(job.threads));
        if (asleep_.exchange(0) > 0) wake_all();
        take_items(0);
        state_.store(number_ * STATE_THREADS);
        // a helper that lost its core to another process needs one to finish
        for (int i = 1; i < job.threads; i++)
            for (int spins = 0; shares_[i].inside.load(); spins++)
                spins < 4096 ? relax() : std::this_thread::yield();
        return true;
    }

  private:
    static constexpr int MOST_THREADS = 256;
    static constexpr uint64_t STATE_THREADS = 1024;  // numbers of threads that a state can say

    void ensure_workers(int wanted) {
        const int started = int(workers_.size());
        for (int i = started; i < wanted; i++) {
            std::thread thread([this, id = i + 1] { work(id); });
            workers_.push_back(thread.native_handle());
            thread.detach();
        }
        if (started < wanted || placed_for_ != num_threads()) place_workers();
    }

    void place_workers() {
        placed_for_ = num_threads();
        const std::vector<int> processors = processors_for(placed_for_);
        taken_.clear();
        for (size_t i = 0; i < workers_.size(); i++) {
            const int processor = i + 1 < processors.size() ? processors[i + 1] : -1;
            bind_thread(workers_[i], processor);
            if (processor >= int(taken_.size())) taken_.resize(processor + 1);
            if (processor >= 0) taken_[processor] = true;
        }
    }

    void take_items(int id) {
        for (int i = 0; i < job_.threads; i++) {
            Share& share = shares_[(id + i) % job_.threads];
            while (share.next.load(std::memory_order_relaxed) < share.end) {
                const int64_t begin = share.next.fetch_add(job_.grain, std::memory_order_relaxed);
                if (begin >= share.end) break;
                const int64_t end = begin + job_.grain;
                job_.run(job_.context, begin, end < share.end ? end : share.end);
            }
        }
    }

    void work(int id) {
        uint64_t seen = 0;
        Share& share = shares_[id];
        for (;;) {
            seen = wait_for_job(id, seen);
            share.inside.store(true);
            if (state_.load() == seen) take_items(id);
            share.inside.store(false, std::memory_order_release);
        }
    }

    // once for each sleep: a call costs some 10 us, and who is awake soon need not be called again
    void wake_all() {
        {
            std::lock_guard<std::mutex> lock(sleep_);
            calls_++;
        }
        wake_.notify_all();
    }

    // The state of a job that is open to this worker and not `seen`. Spins first, since the next
    // kernel usually follows at once, then lets others run in between, since the next step follows
    // soon, and then sleeps until it is called.
    uint64_t wait_for_job(int id, uint64_t seen) {
        using Clock = std::chrono::steady_clock;
        const auto is_new = [=](uint64_t state) {
            return state != seen && uint64_t(id) < state % STATE_THREADS;
        };
        for (;;) {
            const auto start = Clock::now();
            const auto spin_until = start + std::chrono::microseconds(100);
            const auto sleep_at = start + std::chrono::milliseconds(1);
            for (auto now = start; now < sleep_at; now = Clock::now()) {
                for (int i = 0; i < 64; i++) {
                    const uint64_t state = state_.load(std::memory_order_acquire);
                    if (is_new(state)) return state;
                    relax();
                }
                if (now > spin_until) std::this_thread::yield();
            }
            std::unique_lock<std::mutex> lock(sleep_);
            asleep_.fetch_add(1);
            const uint64_t state = state_.load();
            if (is_new(state)) return state;
            wake_.wait(lock, [&, calls = calls_] { return calls_ != calls; });
        }
    }

    Share shares_[MOST_THREADS];
    alignas(64) std::atomic<uint64_t> state_{0};
    Job job_{};
    alignas(64) std::atomic<int> asleep_{0};  // since the last call
    uint64_t calls_ = 0;                      // guarded by sleep_
    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread::native_handle_type> workers_;
    std::vector<bool> taken_;  // by processor: whether a worker is bound to it
    int placed_for_ = 0;
    uint64_t number_ = 0;
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
    if (helpers < 1 || !the_pool().try_run({items, grain, helpers + 1, run, context}))
        run(context, 0, items);
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
