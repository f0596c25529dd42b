// A parameter of a kernel. `element` is the size in bytes of the floating-point numbers it points to, or 0.
#pragma once

namespace emulated {
struct Parameter { unsigned bytes, is_pointer, is_constant, element; };
}  // namespace emulated
