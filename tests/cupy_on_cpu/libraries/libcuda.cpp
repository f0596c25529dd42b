// libcuda: the documented functions of CUDA's driver that CuPy calls. A module is a library of kernels made by g++.
//
// Functions that need the text of a kernel or its source lines are in Python (tests/cupy_on_cpu/modules.py).
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "device.hpp"

namespace device {

struct Function {
    emulated::Library* library;
    void (*entry)(void**);
    const emulated::Parameter* parameters;
    size_t static_memory;
    char name[256];
    size_t granted = 0;  // requested dynamic shared memory
};
constexpr size_t UNASKED = 48 << 10, MOST_SHARED = 227 << 10;  // shared memory without a request, and at most

// The functions of modules.py, and those of the emulator that Python has loaded.
struct Hooks {
    int (*load_file)(const char* path, void** module);
    int (*load_data)(const void* image, void** module);
    int (*find)(void* module, const char* name, Function* function);
    void (*locate)(emulated::Library* library, const char* reports, char* located, size_t size);
    int (*run)(emulated::Library*, void (*)(void**), const unsigned*, const unsigned*, size_t, void**, Region**, int,
               const emulated::LaunchOptions*);
    const char* (*report)(int);
};
static Hooks hooks;
static emulated::LaunchOptions options{-1, 0, 1, 0, 30.0};  // -1: each launch takes the next order

extern "C" __attribute__((visibility("default"))) void emulated_hooks(const Hooks* given) { hooks = *given; }
extern "C" __attribute__((visibility("default"))) emulated::LaunchOptions* emulated_options() { return &options; }

static int context;  // its address is the handle of the only context

// ---------------------------------------------------------------------------------------------- errors, context

API CUresult cuGetErrorName(CUresult error, const char** text) {
    *text = error == CUDA_SUCCESS                ? "CUDA_SUCCESS"
            : error == CUDA_ERROR_INVALID_VALUE  ? "CUDA_ERROR_INVALID_VALUE"
            : error == CUDA_ERROR_INVALID_IMAGE  ? "CUDA_ERROR_INVALID_IMAGE"
            : error == CUDA_ERROR_FILE_NOT_FOUND ? "CUDA_ERROR_FILE_NOT_FOUND"
            : error == CUDA_ERROR_INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE"
            : error == CUDA_ERROR_NOT_FOUND      ? "CUDA_ERROR_NOT_FOUND"
            : error == CUDA_ERROR_LAUNCH_FAILED  ? "CUDA_ERROR_LAUNCH_FAILED"
            : error == CUDA_ERROR_NOT_SUPPORTED  ? "CUDA_ERROR_NOT_SUPPORTED"
                                                 : "CUDA_ERROR_UNKNOWN";
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char** text) {
    static thread_local std::string why;
    why = error == CUDA_ERROR_LAUNCH_FAILED    ? failure()
          : error == CUDA_ERROR_INVALID_VALUE  ? "invalid argument"
          : error == CUDA_ERROR_INVALID_IMAGE  ? "device kernel image is invalid"
          : error == CUDA_ERROR_FILE_NOT_FOUND ? "file not found"
          : error == CUDA_ERROR_INVALID_HANDLE ? "invalid resource handle"
          : error == CUDA_ERROR_NOT_FOUND      ? "named symbol not found"
          : error == CUDA_ERROR_NOT_SUPPORTED  ? "operation not supported"
                                               : "unknown error";
    *text = why.c_str();
    return CUDA_SUCCESS;
}
API CUresult cuInit(unsigned flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
API CUresult cuDriverGetVersion(int* version) { return CUresult(cudaDriverGetVersion(version)); }
API CUresult cuDeviceGetCount(int* count) { return CUresult(cudaGetDeviceCount(count)); }
API CUresult cuDeviceGet(CUdevice* device, int number) { *device = number; return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* current) { *current = CUcontext(&context); return CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* device) { return CUresult(cudaGetDevice(device)); }
API CUresult cuStreamGetCtx(CUstream, CUcontext* current) { return cuCtxGetCurrent(current); }

// ---------------------------------------------------------------------------------------------- modules

API CUresult cuModuleLoad(CUmodule* module, const char* path) { return CUresult(hooks.load_file(path, (void**)module)); }
API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return CUresult(hooks.load_data(image, (void**)module));
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }  // nothing is unloaded: graphs may hold its functions
API CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
    auto* const function = new Function{};
    strncpy(function->name, name, sizeof function->name - 1);
    *handle = CUfunction(function);
    const auto result = CUresult(hooks.find(module, name, function));
    function->granted = UNASKED - std::min(UNASKED, function->static_memory);
    return result;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    const auto& function = *reinterpret_cast<Function*>(handle);
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
             : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES   ? int(function.static_memory)
             : attribute == CU_FUNC_ATTRIBUTE_BINARY_VERSION      ? 90
             : attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? int(function.granted)
                                                                            : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    auto& function = *reinterpret_cast<Function*>(handle);
    if (value < 0 || value + function.static_memory > MOST_SHARED) return CUDA_ERROR_INVALID_VALUE;
    function.granted = value;
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int block, size_t) {
    *count = 2048 / std::max(block, 1);
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction, CUoccupancyB2DSize, size_t, int limit) {
    *grid = 132;
    *block = limit ? limit : 1024;
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------------------------------------- launches

// The values of a kernel's parameters, kept until it runs.
struct Arguments {
    std::vector<std::vector<char>> values;
    std::vector<void*> pointers;

    Arguments(const emulated::Parameter* parameter, void** given) {
        for (; parameter->bytes; ++parameter, ++given) {
            // 64 additional bytes, because a struct may have an alignment of 64.
            std::vector<char> value(parameter->bytes + 64);
            char* const aligned = value.data() + (64 - uintptr_t(value.data()) % 64) % 64;
            memcpy(aligned, *given, parameter->bytes);
            values.push_back(std::move(value));
            pointers.push_back(aligned);
        }
    }
    Arguments(const Arguments&) = delete;
};

static cudaError_t failed_launch(const std::string& text) {
    failure() = text;
    return cudaErrorLaunchFailure;
}

// Finds the device memory that the pointers among the arguments point to; returns an error text for any other pointer.
static std::string regions_of(const Function& function, const Arguments& arguments, int device,
                              std::vector<Region*>& regions) {
    for (size_t i = 0; i < arguments.pointers.size(); ++i) {
        const emulated::Parameter& parameter = function.parameters[i];
        if (!parameter.is_pointer) continue;
        void* const pointer = *static_cast<void**>(arguments.pointers[i]);
        if (!pointer) continue;
        Region* const region = region_of(pointer);
        const std::string name = "argument " + std::to_string(i);
        if (!region) return name + " is no pointer to device memory";
        if (device_of(pointer) != device) return name + " is memory of another device than the kernel's";
        const bool is_new = std::find(regions.begin(), regions.end(), region) == regions.end();
        region->name = is_new ? name : region->name + " and " + name;
        region->read_only = parameter.is_constant && (is_new || region->read_only);
        region->element = is_new || region->element == parameter.element ? parameter.element : 0;
        if (is_new) regions.push_back(region);
    }
    return "";
}

static cudaError_t run(const Function& function, const Arguments& arguments, int device, const unsigned (&grid)[3],
                       const unsigned (&block)[3], size_t shared_memory) {
    std::vector<Region*> regions;
    const std::string wrong = regions_of(function, arguments, device, regions);
    if (!wrong.empty()) return failed_launch(std::string(function.name) + ": " + wrong);
    emulated::LaunchOptions how = options;
    ++options.seed;
    if (how.order < 0) how.order = int(how.seed % 3);
    std::vector<void*> pointers = arguments.pointers;
    const int count = hooks.run(function.library, function.entry, grid, block, shared_memory, pointers.data(), regions.data(),
                                int(regions.size()), &how);
    for (const Region* region : regions)
        if (!is_intact(*region)) return failed_launch(std::string(function.name) + ": " + region->name + ": written beyond its end");
    if (count == 0) return cudaSuccess;
    std::string text;
    for (int i = 0; i < count; ++i) text += std::string(i ? "\n" : "") + hooks.report(i);
    std::vector<char> located(8 << 10);
    hooks.locate(function.library, text.c_str(), located.data(), located.size());
    return failed_launch(std::string(function.name) + ": " + located.data());
}

API CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared_memory, CUstream stream, void** given,
                            void** extra) {
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    std::lock_guard<std::recursive_mutex> guard(lock());
    if (!is_here(cudaStream_t(stream))) return CUDA_ERROR_INVALID_HANDLE;
    const auto* const function = reinterpret_cast<Function*>(handle);
    if (shared_memory > function->granted) return CUDA_ERROR_INVALID_VALUE;
    auto arguments = std::make_shared<const Arguments>(function->parameters, given);
    int device = 0;
    cudaGetDevice(&device);
    const cudaError_t error = enqueue(cudaStream_t(stream), [=] {
        return run(*function, *arguments, device, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_memory);
    });
    return error == cudaErrorLaunchFailure ? CUDA_ERROR_LAUNCH_FAILED : CUresult(error);
}

}  // namespace device
