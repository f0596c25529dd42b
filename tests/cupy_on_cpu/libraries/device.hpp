// The device that CuPy finds: its memory, and its streams, whose work waits until somebody waits for it.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <mutex>
#include <string>

#include "launch.hpp"

#define API extern "C" __attribute__((visibility("default")))

namespace device {

using emulated::Region;
using Work = std::function<cudaError_t()>;

// Held by every function of these libraries that touches what follows.
std::recursive_mutex& lock();

// The device memory that an address lies in, or nullptr.
Region* region_of(const void* address);

// The device that an address of device memory belongs to.
int device_of(const void* address);

// Whether the bytes between the end of an allocation and the page behind it are as they were.
bool is_intact(const Region& region);

// Whether a stream belongs to the device of this thread.
bool is_here(cudaStream_t stream);

// Does a work now, later, or each time that a graph is launched, as the stream has it.
cudaError_t enqueue(cudaStream_t stream, Work work);

// Says why a launch failed, for the messages of errors that come later than it.
std::string& failure();

}  // namespace device
