// Which processors threads may run on.
#pragma once

#include <thread>
#include <vector>

namespace hasten {

// A processor for each of `threads` threads, the caller's own (where it runs now) first, if there
// is exactly one thread for each core, or for each hardware thread, that the calling thread may
// use. Empty otherwise, without HASTEN_PIN=1, and where the system cannot say.
std::vector<int> processors_for(int threads);

// The processor that the calling thread runs on, -1 if the system cannot say.
int current_processor();

// Binds a thread to one processor; -1 gives it those of the calling thread.
void bind_thread(std::thread::native_handle_type thread, int processor);

}  // namespace hasten
