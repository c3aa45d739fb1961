#include "cores.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

namespace hasten {
namespace {

// the first hardware thread of the core that a processor belongs to
int core_of(int processor) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(processor) +
                       "/topology/thread_siblings_list");
    int first;
    return file >> first ? first : processor;
}

}  // namespace

std::vector<int> processors_for(int threads) {
    const char* wanted = std::getenv("HASTEN_PIN");
    cpu_set_t allowed;
    if (!wanted || std::strcmp(wanted, "1") || sched_getaffinity(0, sizeof allowed, &allowed))
        return {};
    const int here = sched_getcpu();
    std::vector<int> all, one_a_core, cores;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        const int processor = (i + here) % CPU_SETSIZE;
        if (!CPU_ISSET(processor, &allowed)) continue;
        all.push_back(processor);
        const int core = core_of(processor);
        if (std::find(cores.begin(), cores.end(), core) != cores.end()) continue;
        cores.push_back(core);
        one_a_core.push_back(processor);
    }
    if (threads == int(one_a_core.size())) return one_a_core;
    if (threads == int(all.size())) return all;
    return {};
}

int current_processor() { return sched_getcpu(); }

void bind_thread(std::thread::native_handle_type thread, int processor) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (processor >= 0)
        CPU_SET(processor, &set);
    else if (sched_getaffinity(0, sizeof set, &set))
        return;
    pthread_setaffinity_np(thread, sizeof set, &set);
}

}  // namespace hasten

#else

namespace hasten {

std::vector<int> processors_for(int) { return {}; }
int current_processor() { return -1; }
void bind_thread(std::thread::native_handle_type, int) {}

}  // namespace hasten
#endif
