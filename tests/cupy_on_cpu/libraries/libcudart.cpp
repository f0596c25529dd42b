// libcudart: the documented functions of CUDA's runtime that CuPy calls, on host memory.
//
// Device memory lies between guard pages and is filled with bytes that are NaN in every float format. Work on the
// default stream is performed immediately. Work on any other stream is deferred until something waits for it, the
// latest moment that CUDA allows, so that code that lacks synchronization reads old data.
#include "device.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

namespace device {

using emulated::PAGE;
using emulated::UNSET;

constexpr size_t ALIGNMENT = 256;             // of allocations of cudaMalloc
constexpr size_t TOTAL = size_t(8) << 30;     // bytes of device memory
constexpr int VERSION = 12090;
constexpr int DEVICES = 2;
constexpr int MULTIPROCESSORS = 132;          // as in gpuconv.gpu.device.MODEL

std::recursive_mutex& lock() {
    static std::recursive_mutex mutex;
    return mutex;
}
using Locked = std::lock_guard<std::recursive_mutex>;

std::string& failure() {
    static std::string text;
    return text;
}

// ---------------------------------------------------------------------------------------------- errors

static thread_local cudaError_t last_error;

static cudaError_t failed(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

extern "C" __attribute__((visibility("default"))) int emulated_refusal() { return failed(cudaErrorNotSupported); }

struct ErrorText {
    cudaError_t error;
    const char *name, *text;
};
static const ErrorText ERRORS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
};

static const ErrorText& text_of(cudaError_t error) {
    static const ErrorText unknown{error, "cudaErrorUnknown", "unknown error"};
    for (const ErrorText& entry : ERRORS)
        if (entry.error == error) return entry;
    return unknown;
}

API const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }
API const char* cudaGetErrorString(cudaError_t error) {
    static thread_local std::string text;
    text = text_of(error).text;
    if (error == cudaErrorLaunchFailure) text += ": " + failure();
    return text.c_str();
}
API cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last_error; }

// ---------------------------------------------------------------------------------------------- the device

API cudaError_t cudaDriverGetVersion(int* version) { *version = VERSION; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { *version = VERSION; return cudaSuccess; }
static thread_local int current;  // the current device of a thread

API cudaError_t cudaGetDeviceCount(int* count) { *count = DEVICES; return cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) return failed(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    static const std::map<int, int> values{
        {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrComputeCapabilityMinor, 0},
        {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxBlockDimX, 1024},
        {cudaDevAttrMaxBlockDimY, 1024},
        {cudaDevAttrMaxBlockDimZ, 64},
        {cudaDevAttrMaxGridDimX, 2147483647},
        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},
        {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
        {cudaDevAttrReservedSharedMemoryPerBlock, 1 << 10},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrMaxRegistersPerBlock, 65536},
        {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
        {cudaDevAttrTotalConstantMemory, 65536},
        {cudaDevAttrUnifiedAddressing, 1},
        {cudaDevAttrConcurrentKernels, 1},
    };
    if (device < 0 || device >= DEVICES) return failed(cudaErrorInvalidDevice);
    const auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int device) {
    if (device < 0 || device >= DEVICES) return failed(cudaErrorInvalidDevice);
    *properties = {};
    strcpy(properties->name, "emulated on the CPU");
    properties->major = 9;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->totalGlobalMem = TOTAL;
    properties->l2CacheSize = 1 << 20;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = 227 << 10;
    properties->sharedMemPerMultiprocessor = 228 << 10;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->totalConstMem = 65536;
    properties->unifiedAddressing = properties->concurrentKernels = 1;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
    snprintf(text, length, "0000:%02d:00.0", device);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) { *device = text[6] - '0'; return cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* value, int, int) { *value = 0; return cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------- memory

struct Allocation {
    int device;
    char* mapping;
    size_t mapped;
    Region region;
};
static std::map<uintptr_t, Allocation> allocations;  // by the first address
static std::map<uintptr_t, size_t> pinned;           // host memory allocated by cudaHostAlloc
static size_t used;

template <class Value> static auto before(std::map<uintptr_t, Value>& map, const void* address) {
    auto next = map.upper_bound(uintptr_t(address));
    return next == map.begin() ? map.end() : --next;
}

static Allocation* allocation_of(const void* address) {
    const auto found = before(allocations, address);
    return found == allocations.end() || uintptr_t(address) > found->second.region.high ? nullptr : &found->second;
}

Region* region_of(const void* address) {
    Allocation* const allocation = allocation_of(address);
    return allocation ? &allocation->region : nullptr;
}

int device_of(const void* address) { return allocation_of(address)->device; }

bool is_intact(const Region& region) {
    const Allocation& found = allocations.at(region.low);
    const char* const page = found.mapping + found.mapped - PAGE;
    return std::all_of(reinterpret_cast<const char*>(region.high), page, [](char byte) { return byte == char(UNSET); });
}

static bool is_on_device(const void* address, size_t bytes) {
    const Region* const region = region_of(address);
    return bytes == 0 || (region && uintptr_t(address) + bytes <= region->high);
}

static bool is_pinned(const void* address) {
    const auto found = before(pinned, address);
    return found != pinned.end() && uintptr_t(address) < found->first + found->second;
}

API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    Locked guard(lock());
    const size_t pages = (bytes + ALIGNMENT + PAGE) / PAGE * PAGE, mapped = pages + 2 * PAGE;
    if (bytes > TOTAL || used + pages > TOTAL) return failed(cudaErrorMemoryAllocation);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    auto* const mapping = static_cast<char*>(mmap(nullptr, mapped, PROT_NONE, flags, -1, 0));
    if (mapping == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    mprotect(mapping + PAGE, pages, PROT_READ | PROT_WRITE);
    memset(mapping + PAGE, UNSET, pages);
    const uintptr_t low = (uintptr_t(mapping) + PAGE + pages - bytes) / ALIGNMENT * ALIGNMENT;
    allocations[low] = {current, mapping, mapped, {low, low + bytes, "device memory", false, false, 0, {}}};
    used += pages;
    *pointer = reinterpret_cast<void*>(low);
    return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    Locked guard(lock());
    if (posix_memalign(pointer, PAGE, std::max(bytes, size_t(1)))) return failed(cudaErrorMemoryAllocation);
    pinned[uintptr_t(*pointer)] = bytes;
    return cudaSuccess;
}

API cudaError_t cudaFreeHost(void* pointer) {
    Locked guard(lock());
    if (!pointer) return cudaSuccess;
    if (!pinned.erase(uintptr_t(pointer))) return failed(cudaErrorInvalidValue);
    free(pointer);
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    Locked guard(lock());
    *free = TOTAL - used;
    *total = TOTAL;
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    Locked guard(lock());
    *attributes = {};
    const bool on_device = region_of(pointer), on_host = !on_device && is_pinned(pointer);
    attributes->type = on_device ? cudaMemoryTypeDevice : on_host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = on_device ? device_of(pointer) : on_host ? 0 : -1;
    if (on_device || on_host) attributes->devicePointer = const_cast<void*>(pointer);
    if (on_host) attributes->hostPointer = const_cast<void*>(pointer);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- streams and graphs

struct Graph {
    std::vector<Work> works;
};

struct Stream {
    int device;
    bool is_blocking;  // synchronizes with the default stream
    std::deque<Work> waiting;
    std::unique_ptr<Graph> capture;
    size_t done = 0;  // operations so far
};
static std::set<Stream*> streams;

struct Event {
    Stream* stream;
    size_t works;  // operations of the stream that precede the event
    double milliseconds;
};
static std::set<Event*> events;

// Returns whether this is one of the handles of the default stream, which is not an object.
static bool is_default(cudaStream_t stream) { return uintptr_t(stream) <= 2; }

static Stream* object(cudaStream_t stream) { return is_default(stream) ? nullptr : reinterpret_cast<Stream*>(stream); }

static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) * 1e3 + double(time.tv_nsec) * 1e-6;
}

// Performs all operations of a stream, or the first `works` of them.
static cudaError_t finish(Stream& stream, size_t works = SIZE_MAX) {
    if (stream.capture) return failed(cudaErrorStreamCaptureUnsupported);
    cudaError_t first = cudaSuccess;
    while (!stream.waiting.empty() && stream.done < works) {
        const Work work = std::move(stream.waiting.front());
        stream.waiting.pop_front();
        ++stream.done;
        const cudaError_t error = work();
        if (first == cudaSuccess) first = error;
    }
    return failed(first);
}

// Finishes all streams that the default stream waits for, or all streams.
static cudaError_t finish_all(bool non_blocking_too) {
    cudaError_t first = cudaSuccess;
    for (Stream* stream : streams)
        if ((stream->is_blocking || non_blocking_too) && !stream->capture) {
            const cudaError_t error = finish(*stream);
            if (first == cudaSuccess) first = error;
        }
    return first;
}

bool is_here(cudaStream_t handle) {
    const Stream* const stream = object(handle);
    return !stream || stream->device == current;
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
    Stream* const stream = object(handle);
    if (stream && stream->capture) {
        stream->capture->works.push_back(std::move(work));
        return cudaSuccess;
    }
    if (stream) {
        stream->waiting.push_back(std::move(work));
        return cudaSuccess;
    }
    const cudaError_t before = finish_all(false), error = work();
    return failed(before != cudaSuccess ? before : error);
}

static cudaError_t wait_for(cudaStream_t handle) {
    Stream* const stream = object(handle);
    return stream ? finish(*stream) : finish_all(false);
}

static cudaError_t new_stream(cudaStream_t* handle, bool is_blocking) {
    Locked guard(lock());
    auto* const stream = new Stream{current, is_blocking, {}, nullptr, 0};
    streams.insert(stream);
    *handle = reinterpret_cast<cudaStream_t>(stream);
    return cudaSuccess;
}

API cudaError_t cudaStreamCreate(cudaStream_t* handle) { return new_stream(handle, true); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return new_stream(handle, flags != cudaStreamNonBlocking);
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
    return new_stream(handle, flags != cudaStreamNonBlocking);
}
API cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
    Locked guard(lock());
    const Stream* const stream = object(handle);
    *flags = !stream || stream->is_blocking ? cudaStreamDefault : cudaStreamNonBlocking;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    Locked guard(lock());
    Stream* const stream = object(handle);
    if (!stream) return failed(cudaErrorInvalidValue);
    const cudaError_t error = finish(*stream);
    for (Event* event : events)
        if (event->stream == stream) event->stream = nullptr;
    streams.erase(stream);
    delete stream;
    return error;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    Locked guard(lock());
    return wait_for(handle);
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
    Locked guard(lock());
    return wait_for(handle);
}
API cudaError_t cudaDeviceSynchronize() {
    Locked guard(lock());
    return finish_all(true);
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    Locked guard(lock());
    const Stream* const stream = object(handle);
    *status = stream && stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
    Locked guard(lock());
    Stream* const stream = object(handle);
    if (!stream || stream->capture) return failed(cudaErrorStreamCaptureUnsupported);
    const cudaError_t error = finish(*stream);
    stream->capture = std::make_unique<Graph>();
    return error;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    Locked guard(lock());
    Stream* const stream = object(handle);
    if (!stream || !stream->capture) return failed(cudaErrorIllegalState);
    *graph = reinterpret_cast<cudaGraph_t>(stream->capture.release());
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
    return cudaSuccess;
}
API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Locked guard(lock());
    for (const Work& work : reinterpret_cast<Graph*>(executable)->works) {
        const cudaError_t error = enqueue(stream, work);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete reinterpret_cast<Graph*>(graph); return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { delete reinterpret_cast<Graph*>(graph); return cudaSuccess; }

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    Locked guard(lock());
    return enqueue(stream, [=] { function(data); return cudaSuccess; });
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
    Locked guard(lock());
    return enqueue(stream, [=] { function(stream, cudaSuccess, data); return cudaSuccess; });
}

// ---------------------------------------------------------------------------------------------- events

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
    Locked guard(lock());
    auto* const event = new Event{nullptr, 0, now()};
    events.insert(event);
    *handle = reinterpret_cast<cudaEvent_t>(event);
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    Locked guard(lock());
    auto* const event = reinterpret_cast<Event*>(handle);
    const cudaError_t error = event->stream ? finish(*event->stream, event->works) : cudaSuccess;
    events.erase(event);
    delete event;
    return error;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
    Locked guard(lock());
    auto* const event = reinterpret_cast<Event*>(handle);
    event->stream = object(stream);
    event->works = event->stream ? event->stream->done + event->stream->waiting.size() + 1 : 0;
    return enqueue(stream, [=] { event->milliseconds = now(); return cudaSuccess; });
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    Locked guard(lock());
    const auto* const event = reinterpret_cast<Event*>(handle);
    return event->stream ? finish(*event->stream, event->works) : finish_all(false);
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) { return cudaEventSynchronize(handle); }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t last) {
    Locked guard(lock());
    const auto &from = *reinterpret_cast<Event*>(first), &to = *reinterpret_cast<Event*>(last);
    for (const Event* event : {&from, &to})
        if (event->stream && event->stream->done < event->works) return failed(cudaErrorNotReady);
    *milliseconds = float(to.milliseconds - from.milliseconds);
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
    Locked guard(lock());
    const auto* const event = reinterpret_cast<Event*>(handle);
    if (!event->stream) return cudaSuccess;
    if (!event->stream->capture) return finish(*event->stream, event->works);
    return event->stream == object(stream) ? cudaSuccess : failed(cudaErrorNotSupported);  // a graph of two streams
}

// ---------------------------------------------------------------------------------------------- freeing memory

API cudaError_t cudaFree(void* pointer) {
    Locked guard(lock());
    if (!pointer) return cudaSuccess;
    const cudaError_t error = finish_all(true);
    const auto found = allocations.find(uintptr_t(pointer));
    if (found == allocations.end()) return failed(cudaErrorInvalidValue);
    used -= found->second.mapped - 2 * PAGE;
    munmap(found->second.mapping, found->second.mapped);
    allocations.erase(found);
    return error;
}

// ---------------------------------------------------------------------------------------------- copies

static cudaError_t check_copy(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    const bool is_right = (!to_device || is_on_device(to, bytes)) && (!from_device || is_on_device(from, bytes));
    return failed(is_right ? cudaSuccess : cudaErrorInvalidValue);
}

static unsigned long reads;  // synchronous copies from device memory to the host
extern "C" __attribute__((visibility("default"))) unsigned long emulated_reads() { return reads; }

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    Locked guard(lock());
    if (const cudaError_t error = check_copy(to, from, bytes, kind)) return error;
    const bool from_host = !region_of(from) && !is_pinned(from), to_host = !region_of(to) && !is_pinned(to);
    reads += region_of(from) && !region_of(to);
    if (from_host) {  // host memory may change as soon as this function returns
        const auto* const first = static_cast<const char*>(from);
        auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
        return enqueue(stream, [=] { memcpy(to, staged->data(), bytes); return cudaSuccess; });
    }
    const cudaError_t error = enqueue(stream, [=] { memmove(to, from, bytes); return cudaSuccess; });
    return to_host && error == cudaSuccess ? wait_for(stream) : error;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
API cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr);
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    Locked guard(lock());
    if (!is_on_device(to, bytes)) return failed(cudaErrorInvalidValue);
    return enqueue(stream, [=] { memset(to, value, bytes); return cudaSuccess; });
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

}  // namespace device
