// A launch: arrays between guard pages, handlers of page faults, a time limit, and the blocks run in sequence.
#include "runtime.hpp"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <ctime>
#include <numeric>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulated {

static Runtime& g = runtime;
static sigjmp_buf out_of_launch;

// ---------------------------------------------------------------------------------------------- faults and the time limit

static int time_signal() { return SIGRTMIN + 7; }

static void on_fault(int signal, siginfo_t* info, void* context) {
    const uintptr_t a = uintptr_t(info->si_addr);
    const void* pc = (const void*)(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
    std::string text = "memory fault at a wild address";
    if (signal == SIGFPE) {
        text = "integer division by zero";
    } else if (a - uintptr_t(g.stacks) < MOST_THREADS * STACK) {
        text = "stack overflow: local variables take more than 128 KiB";
    } else {
        const Region* nearest = nullptr;
        size_t distance = PAGE;
        for (const Region* r : g.arrays) {
            const size_t d = a < r->low ? r->low - a : a - r->high;
            if (d <= distance) {
                distance = d;
                nearest = r;
            }
        }
        if (nearest)
            text = "memory fault: access " + std::to_string(distance) + " bytes " +
                   (a < nearest->low ? "before " : "past the end of ") + nearest->name;
        else if (a - uintptr_t(g.arena) < MOST_SHARED + 2 * PAGE)
            text = "memory fault: access past the end of dynamic shared memory";
    }
    g.reports.push_back((g.current ? name_of(*g.current) + ": " : "") + text + place(pc));
    g.aborted = true;
    siglongjmp(out_of_launch, 1);
}

// In the code of the kernel the launch can be ended immediately; elsewhere the next check ends it.
static void on_time(int, siginfo_t*, void* context) {
    g.out_of_time = true;
    const uintptr_t pc = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (!g.library || pc < g.library->low || pc >= g.library->high) return;
    g.reports.push_back(name_of(*g.current) + ": " + OUT_OF_TIME + place((const void*)(pc + 1)));
    g.aborted = true;
    siglongjmp(out_of_launch, 1);
}

// For the duration of a launch: signal handlers on a separate stack, and a timer for this thread.
class Guard {
    struct sigaction old_segv, old_bus, old_fpe, old_time;
    stack_t old_stack;
    timer_t timer;

public:
    explicit Guard(double seconds) {
        static char stack[64 << 10];
        stack_t ours{};
        ours.ss_sp = stack;
        ours.ss_size = sizeof stack;
        sigaltstack(&ours, &old_stack);
        struct sigaction action{};
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        action.sa_sigaction = on_fault;
        sigaction(SIGSEGV, &action, &old_segv);
        sigaction(SIGBUS, &action, &old_bus);
        sigaction(SIGFPE, &action, &old_fpe);
        action.sa_sigaction = on_time;
        sigaction(time_signal(), &action, &old_time);
        struct sigevent event{};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = time_signal();
        event._sigev_un._tid = int(syscall(SYS_gettid));
        timer_create(CLOCK_MONOTONIC, &event, &timer);
        struct itimerspec limit{};
        limit.it_value.tv_sec = time_t(seconds);
        limit.it_value.tv_nsec = long((seconds - double(time_t(seconds))) * 1e9);
        limit.it_interval.tv_nsec = 50'000'000;  // repeated until it interrupts the code of the kernel
        timer_settime(timer, 0, &limit, nullptr);
    }
    ~Guard() {
        timer_delete(timer);
        sigaction(SIGSEGV, &old_segv, nullptr);
        sigaction(SIGBUS, &old_bus, nullptr);
        sigaction(SIGFPE, &old_fpe, nullptr);
        sigaction(time_signal(), &old_time, nullptr);
        sigaltstack(&old_stack, nullptr);
    }
};

// ---------------------------------------------------------------------------------------------- launching

// An array of the caller: its memory, the pointer into it that the kernel receives, and the index of the argument.
struct Argument {
    char* memory;
    size_t bytes;
    ptrdiff_t origin;  // offset within the memory of the pointer that the kernel receives
    const char* name;
    int slot, read_only;
    size_t element;
};

// A copy of an argument between guard pages: immediately before one, or immediately after one.
class Guarded {
    const Argument& argument;
    char* mapping;
    size_t mapped;
    char* copy;

public:
    Region region;
    void* pointer;

    Guarded(const Argument& a, bool at_end) : argument(a) {
        const size_t offset = uintptr_t(a.memory) % 16;  // keeps the alignment of the array for vector accesses
        const size_t pages = (a.bytes + offset + 15 + PAGE) / PAGE * PAGE;
        mapped = pages + 2 * PAGE;
        mapping = static_cast<char*>(mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(mapping + PAGE, pages, PROT_READ | PROT_WRITE);
        char* const last = mapping + PAGE + pages - a.bytes;
        copy = at_end ? last - (uintptr_t(last) + 16 - offset) % 16 : mapping + PAGE + offset;
        memset(mapping + PAGE, UNSET, pages);
        memcpy(copy, a.memory, a.bytes);
        region = {uintptr_t(copy), uintptr_t(copy) + a.bytes, a.name, false, a.read_only != 0, a.element, {}};
        pointer = copy + a.origin;
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(mapping, mapped); }

    // Copies the result back to the caller, unless there is an error, which is reported instead.
    void finish() {
        for (char* p = mapping + PAGE; p < mapping + mapped - PAGE; ++p)
            if ((p < copy || p >= copy + argument.bytes) && (unsigned char)(*p) != UNSET) {
                report(nullptr, argument.name, "something was written next to " + region.name);
                break;
            }
        if (memcmp(copy, argument.memory, argument.bytes) == 0) return;
        if (argument.read_only) report(nullptr, argument.name, "the read-only " + region.name + " was written to");
        else memcpy(argument.memory, copy, argument.bytes);
    }
};

static void allocate() {
    if (g.stacks) return;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    g.stacks = static_cast<char*>(mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0));
    for (int t = 0; t < MOST_THREADS; ++t) mprotect(g.stacks + size_t(t) * STACK, PAGE, PROT_NONE);
    const size_t size = (MOST_SHARED + PAGE - 1) / PAGE * PAGE;
    g.arena = static_cast<char*>(mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0));
    mprotect(g.arena + size, PAGE, PROT_NONE);
}

static void start(Library* library, const LaunchOptions* options) {
    g.reports.clear();
    g.aborted = g.out_of_time = false;
    g.library = library;
    g.checked = library->checked;
    g.order = options->order;
    g.late_copies = options->late_copies != 0;
    g.profiled = options->profiled != 0;
    profile_start();
    g.random_state = options->seed * 0x9e3779b97f4a7c15u + 1;
    g.global_atomics = 0;
}

static void run_blocks(const unsigned* grid, const unsigned* block, double seconds) {
    Thread launch{};
    launch.block_dim = {block[0], block[1], block[2]};
    launch.grid_dim = {grid[0], grid[1], grid[2]};
    std::vector<uint64_t> blocks(uint64_t(grid[0]) * grid[1] * grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (g.order == REVERSE) std::reverse(blocks.begin(), blocks.end());
    if (g.order == RANDOM)
        for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[next_random() % i]);
    Guard guard(seconds);
    if (sigsetjmp(out_of_launch, 1)) return;
    for (uint64_t i : blocks) {
        run_block({unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]), unsigned(i / grid[0] / grid[1])}, launch);
        if (g.aborted) return;
    }
}

extern "C" {

Library* emulated_library(uintptr_t low, uintptr_t high, int checked, int count, const size_t* offsets,
                          const size_t* sizes, const char* const* names) {
    auto* library = new Library{low, high, checked != 0, {}, {}};
    uintptr_t first = 0, last = 0;
    for (int i = 0; i < count; ++i) {
        const SharedArray array{low + offsets[i], low + offsets[i] + sizes[i], names[i]};
        library->arrays.push_back(array);
        first = i ? std::min(first, array.low) : array.low;
        last = std::max(last, array.high);
    }
    library->statics = {first, last, "shared memory", true, false, 0, {}};
    return library;
}

// Runs a grid on regions of memory that it may access, and returns the number of reports.
int emulated_run(Library* library, void (*entry)(void**), const unsigned* grid, const unsigned* block, size_t shared_bytes,
                 void** arguments, Region** regions, int count, const LaunchOptions* options) {
    allocate();
    start(library, options);
    g.entry = entry;
    g.arguments = arguments;
    g.threads = int(block[0] * block[1] * block[2]);
    g.warps = (g.threads + 31) / 32;
    g.arena_bytes = shared_bytes;
    if (g.threads < 1 || g.threads > MOST_THREADS || shared_bytes > MOST_SHARED || grid[1] > 65535 || grid[2] > 65535) {
        g.reports.push_back("a block has 1 to 1024 threads and at most 227 KiB of shared memory; a grid has at most 65535"
                            " blocks along its second and third axis");
        return 1;
    }
    g.arrays.assign(regions, regions + count);
    std::sort(g.arrays.begin(), g.arrays.end(), [](Region* a, Region* b) { return a->low < b->low; });
    g.first_serial = g.serial + 1;
    prepare_checks();
    run_blocks(grid, block, options->seconds);
    g.current = nullptr;
    g.arrays.clear();
    return int(g.reports.size());
}

// The same on copies of the caller's arrays, each between guard pages.
int emulated_launch(Library* library, void (*entry)(void**), const unsigned* grid, const unsigned* block,
                    size_t shared_bytes, void** arguments, const Argument* given, int count, const LaunchOptions* options) {
    std::vector<Guarded*> guarded;
    std::vector<Region*> regions;
    std::vector<void*> pointers(count);
    for (int i = 0; i < count; ++i) {
        guarded.push_back(new Guarded(given[i], options->order != REVERSE));
        regions.push_back(&guarded.back()->region);
        pointers[i] = guarded.back()->pointer;
        arguments[given[i].slot] = &pointers[i];
    }
    emulated_run(library, entry, grid, block, shared_bytes, arguments, regions.data(), count, options);
    for (Guarded* array : guarded) {
        array->finish();
        delete array;
    }
    return int(g.reports.size());
}

const char* emulated_report(int i) { return g.reports[i].c_str(); }
uint64_t emulated_global_atomics() { return g.global_atomics; }
const char* emulated_profile() {
    static std::string text;
    text = profile_text();
    return text.c_str();
}

}  // extern "C"
}  // namespace emulated
