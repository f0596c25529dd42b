// Threads as fibers: a block's threads take turns on one thread of the CPU, each running until it has to wait.
// Blocks run one after the other. Which thread and which block comes next is natural, reversed or drawn at random.
#include "runtime.hpp"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <ctime>
#include <numeric>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulated {

Runtime runtime;
static Runtime& g = runtime;
static sigjmp_buf out_of_launch;

extern "C" {
const Thread* emulated_thread = nullptr;

// Saves the registers that a called function must keep, changes stacks, and restores them.
void emulated_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch,@function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");
}

uint64_t next_random() {  // xorshift64
    uint64_t& s = g.random_state;
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return s;
}

// ---------------------------------------------------------------------------------------------- reports

std::string name_of(const Fiber& fiber) {
    char text[120];
    const uint3 b = fiber.view.block, t = fiber.view.thread;
    snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    return text;
}

// The loader finds the source line of an address in the kernels' library.
std::string place(const void* pc) {
    const uintptr_t a = uintptr_t(pc);
    if (!g.library || a < g.library->low || a >= g.library->high) return "";
    char text[40];
    snprintf(text, sizeof text, " at {%#zx}", size_t(a - g.library->low));
    return text;
}

void report(const void* pc, const char* kind, const std::string& text) {
    static std::vector<std::pair<const char*, const void*>> seen;
    if (g.reports.empty()) seen.clear();
    const std::pair<const char*, const void*> what{kind, pc};
    if (g.reports.size() >= 20 || std::find(seen.begin(), seen.end(), what) != seen.end()) return;
    seen.push_back(what);
    g.reports.push_back((g.current ? name_of(*g.current) + ": " : "") + text + place(pc));
}

static void leave() {
    Fiber* const fiber = g.current;
    g.current = nullptr;
    emulated_switch(&fiber->stack_pointer, g.main_stack_pointer);
    abort();
}

void give_up(const void* pc, const std::string& text) {
    g.reports.push_back((g.current ? name_of(*g.current) + ": " : "") + text + place(pc));
    g.aborted = true;
    leave();
    __builtin_unreachable();
}

extern "C" void emulated_complain(const char* text) { report(__builtin_return_address(0), "complaint", text); }

// ---------------------------------------------------------------------------------------------- taking turns

static const char* const OUT_OF_TIME = "the launch takes longer than its time limit";

void check_time() {
    if (g.out_of_time) give_up(nullptr, OUT_OF_TIME);
}

static void make_ready(std::vector<int>& threads) {
    if (g.order == NATURAL) std::sort(threads.begin(), threads.end());
    if (g.order == REVERSE) std::sort(threads.begin(), threads.end(), std::greater<int>());
    if (g.order == RANDOM)
        for (size_t i = threads.size(); i > 1; --i) std::swap(threads[i - 1], threads[next_random() % i]);
    for (int t : threads) {
        g.fibers[t].state = State::READY;
        g.ready.push_back(t);
    }
    threads.clear();
}

static std::string waiting_place(const Fiber& fiber) {
    if (!fiber.file) return fiber.waits_for + place(fiber.pc);
    const char* slash = strrchr(fiber.file, '/');
    return std::string(fiber.waits_for) + " at " + (slash ? slash + 1 : fiber.file) + ":" + std::to_string(fiber.line);
}

// Who waits where: threads in runs, as "threads 0-30 wait in a shuffle at ...".
static std::string who_waits() {
    std::string text;
    for (int first = 0; first < g.threads;) {
        const Fiber& fiber = g.fibers[first];
        const bool returned = fiber.state == State::RETURNED;
        const std::string where = returned ? "" : waiting_place(fiber);
        int last = first;
        while (last + 1 < g.threads && (g.fibers[last + 1].state == State::RETURNED) == returned &&
               (returned || waiting_place(g.fibers[last + 1]) == where))
            ++last;
        const bool one = first == last;
        text += (text.empty() ? "" : "; ") + std::string(one ? "thread " : "threads ") + std::to_string(first) +
                (one ? "" : "-" + std::to_string(last));
        text += returned ? (one ? " has returned" : " have returned") : (one ? " waits in " : " wait in ") + where;
        if (text.size() > 1500) return text + "; ...";
        first = last + 1;
    }
    return text;
}

// The current thread is queued, waits or has returned: the next one goes on.
static void switch_away() {
    Fiber* const from = g.current;
    check_time();
    if (g.next == g.ready.size()) {
        if (g.live == 0) leave();
        give_up(nullptr, "deadlock: " + who_waits());
    }
    if (g.order == RANDOM) std::swap(g.ready[g.next], g.ready[g.next + next_random() % (g.ready.size() - g.next)]);
    Fiber* const to = &g.fibers[g.ready[g.next++]];
    if (g.next == g.ready.size()) {
        g.ready.clear();
        g.next = 0;
    }
    to->state = State::RUNNING;
    g.current = to;
    emulated_thread = &to->view;
    if (to != from) emulated_switch(&from->stack_pointer, to->stack_pointer);
}

// ---------------------------------------------------------------------------------------------- barriers

static void release_barrier() {
    g.barrier_file = nullptr;
    order_warps(~0u);
    make_ready(g.at_barrier);
}

extern "C" int emulated_barrier(const char* file, int line, int number, int kind, int predicate) {
    Fiber& fiber = *g.current;
    fiber.waits_for = "__syncthreads()";
    fiber.file = file;
    fiber.line = line;
    fiber.state = State::AT_BARRIER;
    if (!g.barrier_file) {
        g.barrier_file = file;
        g.barrier_line = line;
        g.barrier_number = number;
        g.barrier_count = 0;
        g.barrier_all = true;
        g.barrier_any = false;
    } else if (g.barrier_number != number || g.barrier_line != line || strcmp(g.barrier_file, file) != 0) {
        g.at_barrier.push_back(fiber.index);
        give_up(__builtin_return_address(0), "diverged barrier: " + who_waits());
    }
    g.barrier_count += predicate;
    g.barrier_all = g.barrier_all && predicate;
    g.barrier_any = g.barrier_any || predicate;
    g.at_barrier.push_back(fiber.index);
    if (int(g.at_barrier.size()) == g.live) {
        if (g.live != g.threads) give_up(__builtin_return_address(0), "barrier after return: " + who_waits());
        g.barrier_result = kind == COUNT ? g.barrier_count : kind == AND ? g.barrier_all : g.barrier_any;
        release_barrier();
    }
    switch_away();
    return g.barrier_result;
}

// ---------------------------------------------------------------------------------------------- warps

static std::string mask_text(unsigned mask) {
    char text[16];
    snprintf(text, sizeof text, "%08x", mask);
    return text;
}

// All lanes have arrived, or the last one that others waited for has returned: the operation, and on they go.
static void complete(Warp& warp, size_t which) {
    const Rendezvous meeting = warp.active[which];
    warp.active.erase(warp.active.begin() + which);
    Lanes lanes;
    lanes.mask = meeting.arrived;
    std::copy(meeting.record, meeting.record + 32, lanes.record);
    if (meeting.operation) meeting.operation(lanes);
    std::vector<int> others;
    for (int lane = 0; lane < 32; ++lane) {
        const int thread = int(&warp - g.warp) * 32 + lane;
        if ((meeting.arrived >> lane & 1) && thread != g.current->index) others.push_back(thread);
    }
    make_ready(others);
}

// `waits_for`: the lanes without which it cannot go on.
static void meet(unsigned mask, unsigned waits_for, Operation operation, void* record, const char* name, const void* pc) {
    Fiber& fiber = *g.current;
    Warp& warp = g.warp[fiber.warp];
    if (!(mask >> fiber.lane & 1))
        give_up(pc, std::string(name) + " whose mask " + mask_text(mask) + " leaves out the calling lane");
    // Lanes that are in another meeting may still come to this one: if they cannot, the deadlock says who waits where.
    size_t which = 0;
    while (which < warp.active.size() && warp.active[which].mask != mask) ++which;
    if (which == warp.active.size()) warp.active.push_back({mask, 0, operation, name, {}});
    Rendezvous& meeting = warp.active[which];
    if (meeting.operation != operation)
        give_up(pc, "diverged warp: this lane executes " + std::string(name) + " while others execute " + meeting.name);
    meeting.record[fiber.lane] = record;
    meeting.arrived |= 1u << fiber.lane;
    if (waits_for & ~meeting.arrived) {
        fiber.state = State::IN_COLLECTIVE;
        fiber.waits_for = name;
        fiber.file = nullptr;
        fiber.pc = pc;
        switch_away();
        return;
    }
    complete(warp, which);
    if (g.order == RANDOM) {  // the last to arrive need not go on first
        std::vector<int> self{fiber.index};
        make_ready(self);
        switch_away();
    }
}

extern "C" void emulated_collective(unsigned mask, Operation operation, void* record, const char* name) {
    meet(mask, mask & g.warp[g.current->warp].present, operation, record, name, __builtin_return_address(0));
}

static void order_own_warp(Lanes&) { order_warps(1u << g.current->warp); }

// A warp's threads share a clock, so __syncwarp() lets it tick; a shuffle does not: it orders no memory. Lanes that
// have returned are not waited for.
extern "C" void emulated_sync_warp(unsigned mask) {
    meet(mask, mask & g.warp[g.current->warp].live, order_own_warp, nullptr, "__syncwarp()", __builtin_return_address(0));
}

static void lane_returned(Warp& warp) {
    for (size_t which = 0; which < warp.active.size(); ++which) {
        const Rendezvous& meeting = warp.active[which];
        if (meeting.operation == order_own_warp && !(meeting.mask & warp.live & ~meeting.arrived)) {
            complete(warp, which);
            return;
        }
    }
}

extern "C" void* emulated_dynamic_shared() { return g.arena; }

// ---------------------------------------------------------------------------------------------- blocks

static void run_thread() {
    g.entry(g.arguments);
    Fiber& fiber = *g.current;
    size_t pending = fiber.open.size();
    for (auto& group : fiber.groups) pending += group.size();
    if (pending) report(nullptr, "pending", "returned with asynchronous copies that nobody waited for");
    fiber.state = State::RETURNED;
    --g.live;
    g.warp[fiber.warp].live &= ~(1u << fiber.lane);
    lane_returned(g.warp[fiber.warp]);
    if (g.live && int(g.at_barrier.size()) == g.live)
        give_up(nullptr, "returned while the others wait: " + who_waits());
    switch_away();
    abort();
}

static void run_block(uint3 block, const Thread& launch) {
    ++g.serial;
    g.ready.clear();
    g.next = 0;
    g.at_barrier.clear();
    g.barrier_file = nullptr;
    g.live = g.threads;
    for (int w = 0; w < g.warps; ++w) {
        const int lanes = std::min(32, g.threads - 32 * w);
        g.warp[w].active.clear();
        g.warp[w].present = g.warp[w].live = lanes == 32 ? ~0u : (1u << lanes) - 1;
        g.clock[w] = 1;
        std::fill_n(g.seen[w], MOST_WARPS, 0);
    }
    memset(g.arena, UNSET, g.arena_bytes);
    for (const SharedArray& array : g.library->arrays) memset((void*)array.low, UNSET, array.high - array.low);
    std::vector<int> all(g.threads);
    std::iota(all.begin(), all.end(), 0);
    for (int t : all) {
        Fiber& fiber = g.fibers[t];
        fiber.view = launch;
        fiber.view.block = block;
        const dim3 d = launch.block_dim;
        fiber.view.thread = {t % d.x, t / d.x % d.y, t / (d.x * d.y)};
        fiber.index = t;
        fiber.lane = t % 32;
        fiber.warp = t / 32;
        fiber.open.clear();
        fiber.groups.clear();
        // A stack that looks as if run_thread had been about to be called: six registers, and where to return to.
        void** top = reinterpret_cast<void**>(g.stacks + size_t(t + 1) * STACK) - 2;
        *top = reinterpret_cast<void*>(&run_thread);
        for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
        fiber.stack_pointer = top - 6;
    }
    make_ready(all);
    Fiber* const first = &g.fibers[g.ready[g.next++]];
    first->state = State::RUNNING;
    g.current = first;
    emulated_thread = &first->view;
    emulated_switch(&g.main_stack_pointer, first->stack_pointer);
    g.current = nullptr;
}

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

// In the kernel's own code the launch can be left at once; elsewhere the next check does it.
static void on_time(int, siginfo_t*, void* context) {
    g.out_of_time = true;
    const uintptr_t pc = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (!g.library || pc < g.library->low || pc >= g.library->high) return;
    g.reports.push_back(name_of(*g.current) + ": " + OUT_OF_TIME + place((const void*)(pc + 1)));
    g.aborted = true;
    siglongjmp(out_of_launch, 1);
}

// For the duration of a launch: handlers on a stack of their own, and a timer for this thread.
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
        limit.it_interval.tv_nsec = 50'000'000;  // until it finds the kernel's own code
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

// An array of the caller: its memory, what of it the kernel is given, and which argument it is.
struct Argument {
    char* memory;
    size_t bytes;
    ptrdiff_t origin;  // of the pointer that the kernel gets, within the memory
    const char* name;
    int slot, read_only;
    size_t element;
};

// A copy of an argument between pages that fault: right in front of one, or right behind one.
class Guarded {
    const Argument& argument;
    char* mapping;
    size_t mapped;
    char* copy;

public:
    Region region;
    void* pointer;

    Guarded(const Argument& a, bool at_end) : argument(a) {
        const size_t offset = uintptr_t(a.memory) % 16;  // vector accesses see the alignment that the array has
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

    // Back to the caller, unless something is wrong: then the report comes before the numbers.
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

struct LaunchOptions {
    int order;
    uint64_t seed;
    int late_copies;
    double seconds;
};

// Runs a grid, and returns how many reports there are.
int emulated_launch(Library* library, void (*entry)(void**), const unsigned* grid, const unsigned* block,
                    size_t shared_bytes, void** arguments, const Argument* given, int count, const LaunchOptions* options) {
    allocate();
    g.reports.clear();
    g.aborted = g.out_of_time = false;
    g.library = library;
    g.checked = library->checked;
    g.entry = entry;
    g.arguments = arguments;
    g.order = options->order;
    g.late_copies = options->late_copies != 0;
    g.random_state = options->seed * 0x9e3779b97f4a7c15u + 1;
    g.threads = int(block[0] * block[1] * block[2]);
    g.warps = (g.threads + 31) / 32;
    g.arena_bytes = shared_bytes;
    g.global_atomics = 0;
    if (g.threads < 1 || g.threads > MOST_THREADS || shared_bytes > MOST_SHARED || grid[1] > 65535 || grid[2] > 65535) {
        g.reports.push_back("a block has 1 to 1024 threads and at most 227 KiB of shared memory; a grid has at most 65535"
                            " blocks along its second and third axis");
        return 1;
    }
    std::vector<Guarded*> guarded;
    std::vector<void*> pointers(count);
    g.arrays.clear();
    for (int i = 0; i < count; ++i) {
        guarded.push_back(new Guarded(given[i], g.order != REVERSE));
        pointers[i] = guarded.back()->pointer;
        arguments[given[i].slot] = &pointers[i];
        g.arrays.push_back(&guarded.back()->region);
    }
    std::sort(g.arrays.begin(), g.arrays.end(), [](Region* a, Region* b) { return a->low < b->low; });
    g.first_serial = g.serial + 1;
    prepare_checks();

    Thread launch{};
    launch.block_dim = {block[0], block[1], block[2]};
    launch.grid_dim = {grid[0], grid[1], grid[2]};
    std::vector<uint64_t> blocks(uint64_t(grid[0]) * grid[1] * grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (g.order == REVERSE) std::reverse(blocks.begin(), blocks.end());
    if (g.order == RANDOM)
        for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[next_random() % i]);
    {
        Guard guard(options->seconds);
        if (sigsetjmp(out_of_launch, 1) == 0)
            for (uint64_t i : blocks) {
                run_block({unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]), unsigned(i / grid[0] / grid[1])}, launch);
                if (g.aborted) break;
            }
    }
    g.current = nullptr;
    for (Guarded* array : guarded) {
        array->finish();
        delete array;
    }
    g.arrays.clear();
    return int(g.reports.size());
}

const char* emulated_report(int i) { return g.reports[i].c_str(); }
uint64_t emulated_global_atomics() { return g.global_atomics; }

}  // extern "C"
}  // namespace emulated
