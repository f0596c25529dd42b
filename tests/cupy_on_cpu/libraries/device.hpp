// The emulated device: its memory, and its streams, whose work is deferred until it is waited for.
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

// Held by every function of these libraries that accesses the state below.
std::recursive_mutex& lock();

// Returns the device memory that contains an address, or nullptr.
Region* region_of(const void* address);

// Returns the device that an address of device memory belongs to.
int device_of(const void* address);

// Returns whether the bytes between the end of an allocation and the next guard page are unchanged.
bool is_intact(const Region& region);

// Returns whether a stream belongs to the device of this thread.
bool is_here(cudaStream_t stream);

// Performs an operation now, later, or at each launch of a graph, depending on the stream.
cudaError_t enqueue(cudaStream_t stream, Work work);

// Returns the reason why a launch failed, for the messages of errors that are reported later.
std::string& failure();

}  // namespace device
