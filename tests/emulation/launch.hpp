// What a launch is given: memory, a library of kernels, and how to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "parameter.hpp"

namespace emulated {

constexpr size_t PAGE = 4096;
constexpr unsigned char UNSET = 0xff;  // fills what nobody has written: NaN in every float format

// What happened last to two neighbouring bytes. Serials count blocks over all launches; 0: nothing happened.
struct Shadow {
    uint32_t write_serial, write_clock, write_pc;
    uint16_t write_thread;
    bool write_atomic;
    uint32_t in_flight;  // serial of the block that has started an asynchronous copy into it
    struct Reader { uint32_t serial, clock, pc; uint16_t thread; } readers[2];
};
constexpr int GRANULE = 2;  // bytes: elements of one byte that lie side by side count as one

// Memory that a kernel may use: an array, the static shared memory, or the dynamic one.
struct Region {
    uintptr_t low, high;
    std::string name;
    bool shared, read_only;
    size_t element;  // bytes of a floating-point number, which tells what is unset; 0: other numbers
    std::vector<Shadow> shadow;
    bool contains(uintptr_t a) const { return a >= low && a < high; }
};

struct SharedArray {
    uintptr_t low, high;
    std::string name;
};

// A library of kernels as it lies in memory.
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
