#include "tape.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <utility>

namespace hasten {
namespace {

std::atomic<bool> profiling{false};
std::mutex profile_lock;
std::map<std::string, Spent> profile;

}  // namespace

void Operation::run() const {
    if (!profiling.load(std::memory_order_relaxed)) {
        call();
        return;
    }
    using Clock = std::chrono::steady_clock;
    const auto began = Clock::now();
    const int64_t read = bytes + call();
    const std::chrono::duration<double> spent = Clock::now() - began;
    std::lock_guard<std::mutex> lock(profile_lock);
    Spent& sum = profile[name];
    sum.calls++;
    sum.bytes += read;
    sum.seconds += spent.count();
}

Tape*& recording() {
    thread_local Tape* tape = nullptr;
    return tape;
}

void set_profiling(bool on) { profiling.store(on); }

std::map<std::string, Spent> take_profile() {
    std::lock_guard<std::mutex> lock(profile_lock);
    return std::exchange(profile, {});
}

}  // namespace hasten
