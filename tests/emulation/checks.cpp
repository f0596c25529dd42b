// Checks of every load and store of a kernel, for errors that a GPU does not report. The kernel is compiled with
// -fsanitize=thread,undefined, so that it calls the hooks below; the libraries of the sanitizers are not linked.
//
// Races are detected by the happens-before relation, with one vector clock per warp. Barriers join the clocks of a
// block's warps, __syncwarp() increments the clock of a warp, and blocks of one launch are never ordered. The record of
// an access has its thread, the clock of its warp, and the serial number of its block.
#include "runtime.hpp"

#include <algorithm>

namespace emulated {

static Runtime& g = runtime;

void prepare_checks() {
    if (!g.checked) return;
    g.arena_region = {uintptr_t(g.arena), uintptr_t(g.arena) + g.arena_bytes, "dynamic shared memory", true, false, 0, {}};
    Library& library = *g.library;
    for (Region* region : {&g.arena_region, &library.statics})
        if (region->shadow.empty()) region->shadow.resize((region->high - region->low) / GRANULE + 1);
    for (Region* region : g.arrays) region->shadow.resize((region->high - region->low) / GRANULE + 1);
}

void order_warps(unsigned warps) {
    if (!g.checked) return;
    uint32_t joined[MOST_WARPS] = {};
    for (int w = 0; w < g.warps; ++w)
        if (warps >> w & 1) {
            ++g.clock[w];
            for (int u = 0; u < g.warps; ++u) joined[u] = std::max(joined[u], g.seen[w][u]);
        }
    for (int w = 0; w < g.warps; ++w)
        if (warps >> w & 1) joined[w] = g.clock[w];
    for (int w = 0; w < g.warps; ++w)
        if (warps >> w & 1) std::copy(joined, joined + MOST_WARPS, g.seen[w]);
}

// Returns whether an access of this block or another happens before the current access of the thread.
static bool comes_before(uint32_t serial, int thread, uint32_t clock, int now) {
    if (serial < g.first_serial) return true;
    if (serial != g.serial) return false;
    return thread == now || clock < g.seen[now / 32][thread / 32];
}

static std::string name_of(const Region& region, uintptr_t a) {
    if (&region == &g.library->statics)
        for (const SharedArray& array : g.library->arrays)
            if (a >= array.low && a < array.high)
                return "shared " + array.name + " + " + std::to_string(a - array.low) + " bytes";
    return region.name + " + " + std::to_string(a - region.low) + " bytes";
}

static const char* verb(int kind) { return kind == READ ? "read" : kind == WRITE ? "write" : "atomic update"; }

static void report_race(int kind, const std::string& what, const char* other, int thread, uint32_t serial, uint32_t other_pc,
                        const void* pc) {
    report(pc, "race",
           std::string("race: ") + verb(kind) + " of " + what + " and a " + other + " by thread " + std::to_string(thread) +
               (serial != g.serial ? " of another block" : "") + place((const void*)(g.library->low + other_pc)) + ", here");
}

static void check_shadow(Region& region, uintptr_t a, size_t bytes, int kind, const void* pc, int me) {
    const uint32_t clock = g.clock[me / 32], own_pc = uint32_t(uintptr_t(pc) - g.library->low);
    for (size_t i = (a - region.low) / GRANULE; i <= (a + bytes - 1 - region.low) / GRANULE; ++i) {
        Shadow& s = region.shadow[i];
        const uintptr_t at = region.low + i * GRANULE;
        if (s.in_flight == g.serial)
            report(pc, "in flight", std::string(verb(kind)) + " of " + name_of(region, at) +
                                        " while an asynchronous copy into it is under way");
        const bool written = region.shared ? s.write_serial == g.serial : s.write_serial >= g.first_serial;
        if (region.shared && kind != WRITE && !written)
            report(pc, "unset", std::string(verb(kind)) + " of " + name_of(region, at) + ", which was never set");
        if (written && !(kind == ATOMIC && s.write_atomic) && !comes_before(s.write_serial, s.write_thread, s.write_clock, me))
            report_race(kind, name_of(region, at), s.write_atomic ? "atomic update" : "write", s.write_thread, s.write_serial,
                        s.write_pc, pc);
        if (kind == READ) {
            // Keep this reader and one of the previous two that is concurrent with it, preferably of another warp.
            Shadow::Reader &last = s.readers[0], &other = s.readers[1];
            const auto concurrent = [&](const Shadow::Reader& r) {
                return r.serial >= g.first_serial && r.thread != me && !comes_before(r.serial, r.thread, r.clock, me);
            };
            if (concurrent(last) && !(concurrent(other) && other.thread / 32 != me / 32)) other = last;
            else if (!concurrent(other)) other = {};
            last = {g.serial, clock, own_pc, uint16_t(me)};
            continue;
        }
        for (const Shadow::Reader& r : s.readers) {
            const bool read = region.shared ? r.serial == g.serial : r.serial >= g.first_serial;
            if (read && !comes_before(r.serial, r.thread, r.clock, me))
                report_race(kind, name_of(region, at), "read", r.thread, r.serial, r.pc, pc);
        }
        s.write_serial = g.serial;
        s.write_thread = uint16_t(me);
        s.write_clock = clock;
        s.write_pc = own_pc;
        s.write_atomic = kind == ATOMIC;
        s.readers[0] = s.readers[1] = {};
    }
}

// Returns the region of an access, or nullptr if it is not checked (local variables, constants).
static Region* region_of(uintptr_t a, size_t bytes, int kind, const void* pc) {
    if (a - uintptr_t(g.stacks) < MOST_THREADS * STACK) return nullptr;
    if (a - uintptr_t(&g) < sizeof g || a == uintptr_t(&emulated_thread)) return nullptr;  // threadIdx and the like
    const std::string what = std::string(verb(kind)) + " of " + std::to_string(bytes) + " bytes ";
    if (a - uintptr_t(g.arena) < MOST_SHARED) {
        if (a + bytes > g.arena_region.high)
            give_up(pc, "out of bounds: " + what + "at " + std::to_string(a - g.arena_region.low) +
                            " in dynamic shared memory, which has " + std::to_string(g.arena_bytes));
        return &g.arena_region;
    }
    Library& library = *g.library;
    if (library.statics.contains(a)) {
        for (const SharedArray& array : library.arrays)
            if (a >= array.low && a < array.high) {
                if (a + bytes > array.high) give_up(pc, "out of bounds: " + what + "past the end of shared " + array.name);
                return &library.statics;
            }
        give_up(pc, "out of bounds: " + what + "between shared arrays");
    }
    const auto after = std::upper_bound(g.arrays.begin(), g.arrays.end(), a, [](uintptr_t v, Region* r) { return v < r->low; });
    if (after != g.arrays.begin() && (*(after - 1))->contains(a)) {
        Region* const region = *(after - 1);
        if (a + bytes > region->high) give_up(pc, "out of bounds: " + what + "past the end of " + region->name);
        if (kind != READ && region->read_only) report(pc, "read-only", what + "in the read-only " + region->name);
        return region;
    }
    if (a >= library.low && a < library.high && kind == READ) return nullptr;  // a table of constants
    if (a >= library.low && a < library.high) give_up(pc, "out of bounds: " + what + "outside all shared arrays");
    const Region* nearest = nullptr;
    size_t distance = ~size_t(0);
    for (const Region* region : g.arrays) {
        const size_t d = a < region->low ? region->low - a : a - region->high;
        if (d < distance) {
            distance = d;
            nearest = region;
        }
    }
    if (!nearest) give_up(pc, "out of bounds: " + what + "at a wild address");
    give_up(pc, "out of bounds: " + what + std::to_string(distance) + " bytes " +
                    (a < nearest->low ? "before " : "past the end of ") + nearest->name + " of " +
                    std::to_string(nearest->high - nearest->low) + " bytes");
}

// Numbers in global memory are unset if they still hold the fill value of the host, a NaN that no arithmetic produces.
static bool is_unset(const Region& region, uintptr_t a, size_t bytes) {
    if (region.element == 0) return false;
    for (uintptr_t e = a; e + region.element <= a + bytes; e += region.element) {
        const auto* p = reinterpret_cast<const unsigned char*>(e);
        if (std::all_of(p, p + region.element, [](unsigned char b) { return b == UNSET; })) return true;
    }
    return false;
}

// Checks an access and returns its region, or nullptr.
Region* check_access(const void* address, size_t bytes, int kind, const void* pc, int thread) {
    check_time();
    const uintptr_t a = uintptr_t(address);
    Region* const region = region_of(a, bytes, kind, pc);
    if (!region) return nullptr;
    if (!region->shared && kind != WRITE && is_unset(*region, a, bytes))
        report(pc, "unset", std::string(verb(kind)) + " of " + name_of(*region, a) + ", which was never set");
    check_shadow(*region, a, bytes, kind, pc, thread);
    return region;
}

extern "C" void emulated_atomic(const void* address, size_t bytes, int count, const void* pc) {
    const uintptr_t a = uintptr_t(address);
    const bool shared = a - uintptr_t(g.arena) < MOST_SHARED || g.library->statics.contains(a);
    if (!shared) g.global_atomics += count;
    const size_t width = bytes / count;
    if (a % bytes) give_up(pc, "misaligned: atomic update of " + std::to_string(bytes) + " bytes");
    if (!g.checked) return;
    for (int i = 0; i < count; ++i) check_access((const char*)address + i * width, width, ATOMIC, pc, g.current->index);
    if (g.profiled) profile_access(address, bytes, ATOMIC, shared, pc, g.current->index);
}

// An asynchronous copy must not conflict with any access after its start; its write takes place when it is waited for.
void check_copy_started(const Copy& copy, int thread) {
    if (copy.present) check_access(copy.from, copy.present, READ, copy.pc, thread);
    Region* const region = region_of(uintptr_t(copy.to), copy.bytes, WRITE, copy.pc);
    if (!region || !region->shared) give_up(copy.pc, "an asynchronous copy whose destination is not shared memory");
    check_shadow(*region, uintptr_t(copy.to), copy.bytes, WRITE, copy.pc, thread);
    if (g.profiled) {
        if (copy.present) profile_access(copy.from, copy.bytes, READ, false, copy.pc, thread);
        profile_access(copy.to, copy.bytes, WRITE, true, copy.pc, thread);
    }
    for (int i = 0; i < copy.bytes; i += GRANULE)
        region->shadow[(uintptr_t(copy.to) - region->low + i) / GRANULE].in_flight = g.serial;
}

void check_copy_done(const Copy& copy, int thread) {
    Region* const region = region_of(uintptr_t(copy.to), copy.bytes, WRITE, copy.pc);
    for (int i = 0; i < copy.bytes; i += GRANULE)
        region->shadow[(uintptr_t(copy.to) - region->low + i) / GRANULE].in_flight = 0;
    check_shadow(*region, uintptr_t(copy.to), copy.bytes, WRITE, copy.pc, thread);
}

// ---------------------------------------------------------------------------------------------- the compiler's hooks

static void hook(const void* address, size_t bytes, int kind, bool aligned, const void* pc) {
    if (!g.current || uintptr_t(address) - uintptr_t(g.stacks) < MOST_THREADS * STACK) return;  // a local variable
    if (aligned && uintptr_t(address) % bytes)
        give_up(pc, std::string("misaligned: ") + verb(kind) + " of " + std::to_string(bytes) + " bytes");
    const Region* const region = check_access(address, bytes, kind, pc, g.current->index);
    if (region && g.profiled) profile_access(address, bytes, kind, region->shared, pc, g.current->index);
}

extern "C" {
#define HOOKS(bytes)                                                                                                         \
    void __tsan_read##bytes(void* p) { hook(p, bytes, READ, true, __builtin_return_address(0)); }                            \
    void __tsan_write##bytes(void* p) { hook(p, bytes, WRITE, true, __builtin_return_address(0)); }                          \
    void __tsan_volatile_read##bytes(void* p) { hook(p, bytes, READ, true, __builtin_return_address(0)); }                   \
    void __tsan_volatile_write##bytes(void* p) { hook(p, bytes, WRITE, true, __builtin_return_address(0)); }                 \
    void __tsan_unaligned_read##bytes(void* p) { hook(p, bytes, READ, false, __builtin_return_address(0)); }                 \
    void __tsan_unaligned_write##bytes(void* p) { hook(p, bytes, WRITE, false, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { if (bytes) hook(p, bytes, READ, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { if (bytes) hook(p, bytes, WRITE, false, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

// The argument of the handlers of undefined behaviour is a record that begins with the source location.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

static void undefined(const void* record, const char* what, const void* pc) {
    const auto& at = *static_cast<const SourceLocation*>(record);
    const char* slash = at.file ? strrchr(at.file, '/') : nullptr;
    const char* file = slash ? slash + 1 : at.file ? at.file : "?";
    report(pc, what, std::string("undefined: ") + what + " in " + file + ":" + std::to_string(at.line));
}

extern "C" {
#define HANDLER(name, what) \
    void __ubsan_handle_##name(void* record, uintptr_t, uintptr_t) { undefined(record, what, __builtin_return_address(0)); }
HANDLER(add_overflow, "integer overflow of +")
HANDLER(sub_overflow, "integer overflow of -")
HANDLER(mul_overflow, "integer overflow of *")
HANDLER(negate_overflow, "integer overflow of negation")
HANDLER(divrem_overflow, "division by zero, or its overflow")
HANDLER(shift_out_of_bounds, "shift by too much")
HANDLER(out_of_bounds, "array index out of bounds")
HANDLER(type_mismatch_v1, "misaligned or null pointer, or one out of its object")
HANDLER(pointer_overflow, "pointer overflow")
HANDLER(float_cast_overflow, "float too large for the integer")
HANDLER(load_invalid_value, "invalid bool or enum")
HANDLER(builtin_unreachable, "unreachable code")
HANDLER(missing_return, "missing return value")
HANDLER(nonnull_arg, "null argument")
HANDLER(invalid_builtin, "bit count of zero")
HANDLER(vla_bound_not_positive, "array of no length")
}
}  // namespace emulated
