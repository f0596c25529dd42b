// A parameter of a kernel; `element` is the bytes of a floating-point number that it points to, 0 for other numbers.
#pragma once

namespace emulated {
struct Parameter { unsigned bytes, is_pointer, is_constant, element; };
}  // namespace emulated
