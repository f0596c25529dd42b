// GPU threads as fibers: the threads of a block share one thread of the CPU, and each runs until it has to wait. Blocks
// run in sequence. The order of threads and blocks is natural, reversed or random.
#include "runtime.hpp"

#include <algorithm>
#include <cstdio>
#include <numeric>

namespace emulated {

Runtime runtime;
static Runtime& g = runtime;

extern "C" {
const Thread* emulated_thread = nullptr;

// Saves the callee-saved registers, switches stacks, and restores the registers.
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

// Formats an address in the library of the kernels; the loader replaces it by its source line.
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

// ---------------------------------------------------------------------------------------------- scheduling

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

// Lists the threads by ranges, with where they wait, as in "threads 0-30 wait in a shuffle at ...".
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

// Returns the next thread to run; the current one is queued, waits or has returned. Does not return if the block is
// complete.
static Fiber& next_fiber() {
    check_time();
    if (g.next == g.ready.size()) {
        if (g.live == 0) leave();
        give_up(nullptr, "deadlock: " + who_waits());
    }
    if (g.order == RANDOM) std::swap(g.ready[g.next], g.ready[g.next + next_random() % (g.ready.size() - g.next)]);
    Fiber& fiber = g.fibers[g.ready[g.next++]];
    if (g.next == g.ready.size()) {
        g.ready.clear();
        g.next = 0;
    }
    fiber.state = State::RUNNING;
    g.current = &fiber;
    emulated_thread = &fiber.view;
    return fiber;
}

static void run_threads();

// Returns a stack prepared as if run_threads were about to be called: six registers and the return address.
static void* fresh_stack() {
    char* const stack = g.idle_stacks.back();
    g.idle_stacks.pop_back();
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;
    *top = reinterpret_cast<void*>(&run_threads);
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    return top - 6;
}

static void switch_away() {
    Fiber& from = *g.current;
    Fiber& to = next_fiber();
    if (!to.stack_pointer) to.stack_pointer = fresh_stack();
    if (&to != &from) emulated_switch(&from.stack_pointer, to.stack_pointer);
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

// Performs the operation and resumes the lanes: all have arrived, or the last one they waited for has returned.
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

// `waits_for`: the lanes that must arrive before the operation is performed.
static void meet(unsigned mask, unsigned waits_for, Operation operation, void* record, const char* name, const void* pc) {
    Fiber& fiber = *g.current;
    Warp& warp = g.warp[fiber.warp];
    if (!(mask >> fiber.lane & 1))
        give_up(pc, std::string(name) + " whose mask " + mask_text(mask) + " leaves out the calling lane");
    // Lanes that wait in another operation may still arrive here; if they cannot, the deadlock report lists them.
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
    if (g.order == RANDOM) {  // the lane that arrives last need not be resumed first
        std::vector<int> self{fiber.index};
        make_ready(self);
        switch_away();
    }
}

void meet_in_warp(unsigned mask, Operation operation, void* record, const char* name, const void* pc) {
    meet(mask, mask & g.warp[g.current->warp].present, operation, record, name, pc);
}

extern "C" void emulated_collective(unsigned mask, Operation operation, void* record, const char* name) {
    meet_in_warp(mask, operation, record, name, __builtin_return_address(0));
}

static void order_own_warp(Lanes&) { order_warps(1u << g.current->warp); }

// The threads of a warp share a clock, which __syncwarp() increments. A shuffle does not, because it does not order
// memory accesses. Lanes that have returned are not waited for.
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

static void finish_thread() {
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
}

// Runs threads in sequence on one stack, until a thread has to wait, which keeps the stack, or a thread with its own
// stack is resumed.
static void run_threads() {
    char* const stack = g.stacks + (static_cast<char*>(__builtin_frame_address(0)) - g.stacks) / STACK * STACK;
    for (;;) {
        g.entry(g.arguments);
        finish_thread();
        Fiber& to = next_fiber();
        if (!to.stack_pointer) continue;
        g.idle_stacks.push_back(stack);
        void* nobody;
        emulated_switch(&nobody, to.stack_pointer);
    }
}

void run_block(uint3 block, const Thread& launch) {
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
    g.idle_stacks.clear();
    for (int t = g.threads; t-- > 0;) g.idle_stacks.push_back(g.stacks + size_t(t) * STACK);
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
        fiber.stack_pointer = nullptr;
    }
    make_ready(all);
    next_fiber();
    emulated_switch(&g.main_stack_pointer, fresh_stack());
    g.current = nullptr;
    if (g.profiled) profile_block_end();
}

}  // namespace emulated
