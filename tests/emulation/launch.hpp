// The inputs of a launch: memory, a library of kernels, and options.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "parameter.hpp"

namespace emulated {

constexpr size_t PAGE = 4096;
constexpr unsigned char UNSET = 0xff;  // fills unwritten memory: NaN in every float format

// The last accesses to two adjacent bytes. Serial numbers count the blocks of all launches; 0: no access.
struct Shadow {
    uint32_t write_serial, write_clock, write_pc;
    uint16_t write_thread;
    bool write_atomic;
    uint32_t in_flight;  // serial number of the block with a pending asynchronous copy to these bytes
    struct Reader { uint32_t serial, clock, pc; uint16_t thread; } readers[2];
};
constexpr int GRANULE = 2;  // bytes: two adjacent elements of one byte count as one

// Memory that a kernel may access: an array, the static or the dynamic shared memory.
struct Region {
    uintptr_t low, high;
    std::string name;
    bool shared, read_only;
    size_t element;  // bytes of a floating-point number, used to detect unset numbers; 0: other numbers
    std::vector<Shadow> shadow;
    bool contains(uintptr_t a) const { return a >= low && a < high; }
};

struct SharedArray {
    uintptr_t low, high;
    std::string name;
};

// The addresses of a loaded library of kernels.
struct Library {
    uintptr_t low, high;
    bool checked;
    std::vector<SharedArray> arrays;
    Region statics;  // from the first shared array to the last
};

enum Order { NATURAL, REVERSE, RANDOM };

struct LaunchOptions {
    int order;
    uint64_t seed;
    int late_copies, profiled;
    double seconds;
};

}  // namespace emulated
