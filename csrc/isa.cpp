// Which instruction set the kernels use: the best that the CPU has, or HASTEN_ISA.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace hasten {

namespace portable { extern const Kernels table; }
#if defined(HASTEN_HAS_AVX2)
namespace avx2 { extern const Kernels table; }
#endif
#if defined(HASTEN_HAS_AVX512)
namespace avx512 { extern const Kernels table, table_vnni; }
#endif

namespace {

struct Level {
    const char* name;
    const Kernels* table;
    bool (*supported)();
};

#if defined(HASTEN_HAS_AVX512)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma");
}
#endif

// best first
const Level LEVELS[] = {
#if defined(HASTEN_HAS_AVX512)
    {"avx512vnni", &avx512::table_vnni,
     [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }},
    {"avx512", &avx512::table, has_avx512},
#endif
#if defined(HASTEN_HAS_AVX2)
    {"avx2", &avx2::table,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", &portable::table, [] { return true; }},
};

const Level* find(const char* name) {
    for (const Level& level : LEVELS)
        if (!std::strcmp(level.name, name)) return &level;
    return nullptr;
}

const Level* best() {
    for (const Level& level : LEVELS)
        if (level.supported()) return &level;
    return nullptr;
}

std::atomic<const Level*>& current() {
    static std::atomic<const Level*> level{best()};
    return level;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->table; }

const char* isa() { return current().load()->name; }

bool isa_supported(const char* name) {
    const Level* level = find(name);
    return level && level->supported();
}

const char* set_isa(const char* name) {
    const Level* level = find(name);
    if (!level) return "there is no such instruction set in this build (avx512vnni, avx512, avx2, portable)";
    if (!level->supported()) return "this CPU does not have the instruction set";
    current().store(level);
    return nullptr;
}

}  // namespace hasten
