// The state of the emulator, shared by scheduler.cpp, launch.cpp, checks.cpp, profile.cpp and instructions.cpp.
#pragma once

#include "cuda.hpp"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include "launch.hpp"

namespace emulated {

constexpr int MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32;
constexpr size_t STACK = 128 << 10, MOST_SHARED = 227 << 10;

enum class State : uint8_t { READY, RUNNING, AT_BARRIER, IN_COLLECTIVE, RETURNED };

// A copy into shared memory that has been started.
struct Copy {
    char* to;
    const char* from;
    int bytes, present;
    const void* pc;
};

// A thread of the GPU: its stack and its state.
struct Fiber {
    Thread view;
    void* stack_pointer;  // nullptr: not started
    State state;
    int index, lane, warp;
    const char* waits_for;  // where it waits: a file and line, or a code address
    const char* file;
    int line;
    const void* pc;
    unsigned mask;
    std::vector<Copy> open;                 // copies since the last commit
    std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
};

struct Rendezvous {
    unsigned mask, arrived;
    Operation operation;
    const char* name;
    void* record[32];
};

struct Warp {
    std::vector<Rendezvous> active;
    unsigned present, live;  // lanes of the block, and those that have not returned
};

struct Runtime {
    Fiber fibers[MOST_THREADS];
    char* stacks;
    std::vector<char*> idle_stacks;
    char* arena;  // dynamic shared memory
    size_t arena_bytes;
    void* main_stack_pointer;
    Fiber* current;
    std::vector<int> ready;  // a queue: `next` is its head
    size_t next;
    int threads, live, warps;
    Warp warp[MOST_WARPS];

    std::vector<int> at_barrier;
    const char* barrier_file;
    int barrier_line, barrier_number, barrier_count, barrier_result;
    bool barrier_all, barrier_any;

    void (*entry)(void**);
    void** arguments;
    Library* library;
    std::vector<Region*> arrays;
    Region arena_region;

    bool checked, profiled, late_copies, aborted;
    volatile bool out_of_time;
    int order;
    uint64_t random_state;
    std::vector<std::string> reports;
    uint64_t global_atomics;

    uint32_t serial, first_serial;                     // of the current block, and of the first block of the launch
    uint32_t clock[MOST_WARPS], seen[MOST_WARPS][MOST_WARPS];  // happens-before, warp by warp
};
extern Runtime runtime;

// scheduler.cpp
uint64_t next_random();
void report(const void* pc, const char* kind, const std::string& text);  // once per kind and place
[[noreturn]] void give_up(const void* pc, const std::string& text);       // ends the launch
std::string name_of(const Fiber& fiber);
std::string place(const void* pc);
void check_time();
constexpr const char* OUT_OF_TIME = "the launch takes longer than its time limit";
// Synchronizes the lanes of the mask that exist in the block; pc is in the line of the kernel to report.
void meet_in_warp(unsigned mask, Operation operation, void* record, const char* name, const void* pc);
void run_block(uint3 block, const Thread& launch);

// checks.cpp
void prepare_checks();
void order_warps(unsigned warps);  // all earlier accesses of these warps happen before their later ones
Region* check_access(const void* address, size_t bytes, int kind, const void* pc, int thread);
void check_copy_started(const Copy& copy, int thread);
void check_copy_done(const Copy& copy, int thread);
enum AccessKind { READ, WRITE, ATOMIC };

// profile.cpp
void profile_start();
void profile_access(const void* address, size_t bytes, int kind, bool shared, const void* pc, int thread);
void profile_block_end();
std::string profile_text();
}  // namespace emulated
