// What happens to an operation beside that it runs: its time is taken while a profile is made, and
// it is kept on a tape while a forward pass is recorded.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace hasten {

// An operation with its arguments. It gives the bytes that it read beyond the fixed ones, which
// only the row numbers of a step tell (keys and values).
struct Operation {
    const char* name;  // a literal
    int64_t bytes;
    std::function<int64_t()> call;

    void run() const;  // and take its time, while a profile is made
};

// Operations in the order in which they ran. The arrays that they refer to belong to whoever made
// the recording.
class Tape {
  public:
    void replay() const {
        for (const Operation& operation : operations) operation.run();
    }
    std::vector<Operation> operations;
};

// Where operations of this thread are kept, or null.
Tape*& recording();

struct Spent {
    int64_t calls = 0, bytes = 0;
    double seconds = 0;
};

void set_profiling(bool on);
// By name, since the last call.
std::map<std::string, Spent> take_profile();

}  // namespace hasten
