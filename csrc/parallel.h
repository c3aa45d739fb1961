// The thread pool. Results never depend on it: an item is computed by one thread, start to end.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hasten {

int num_threads();
void set_num_threads(int threads);

// Calls run(context, begin, end) over disjoint ranges that cover [0, items), at most `grain`
// items a range. The calling thread works too and returns when all is done. Without other
// threads, or when the pool is busy with another caller, it does everything itself.
void run_parallel(int64_t items, int64_t grain, void (*run)(void*, int64_t, int64_t),
                  void* context);

// Memory of at least `bytes` bytes that belongs to the calling thread (64-byte aligned), valid
// until its next call.
void* scratch(size_t bytes);

// `work` is the whole work in units of about one multiply-add; a small job stays on one thread.
template <class F>
void parallel(int64_t items, int64_t grain, int64_t work, const F& body) {
    const int64_t too_small = 1 << 15;
    if (work < too_small || items <= grain) {
        if (items > 0) body(int64_t(0), items);
        return;
    }
    run_parallel(
        items, grain,
        [](void* context, int64_t begin, int64_t end) { (*(const F*)context)(begin, end); },
        (void*)&body);
}

}  // namespace hasten
