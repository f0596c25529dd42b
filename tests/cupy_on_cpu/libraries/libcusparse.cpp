// libcusparse: the product of a CSR matrix and a vector, which CuPy's sparse matrices call.
#include "device.hpp"

#include <complex>
#include <vector>

namespace {

constexpr int SUCCESS = 0, NOT_SUPPORTED = 10;
enum Operation { NONE, TRANSPOSE, CONJUGATE };
enum Type { FLOAT = 0, DOUBLE = 1, COMPLEX = 4, DOUBLE_COMPLEX = 5 };  // cudaDataType
enum IndexType { INT32 = 2, INT64 = 3 };

struct Handle {
    cudaStream_t stream;
};
struct Rows {
    long rows, columns;
    const void *offsets, *indices, *values;
    int offset_type, index_type, base;
};
struct Vector {
    long count;
    void* values;
};

long number(const void* numbers, int type, long i) {
    return type == INT64 ? static_cast<const long*>(numbers)[i] : static_cast<const int*>(numbers)[i];
}

template <class T> T conjugate(T value) { return value; }
template <class T> std::complex<T> conjugate(std::complex<T> value) { return std::conj(value); }

template <class T> void multiply(const Rows& a, int operation, T alpha, const Vector& x, T beta, const Vector& y) {
    const T *const values = static_cast<const T*>(a.values), *const from = static_cast<const T*>(x.values);
    std::vector<T> sums(y.count);
    for (long row = 0; row < a.rows; ++row)
        for (long e = number(a.offsets, a.offset_type, row); e < number(a.offsets, a.offset_type, row + 1); ++e) {
            const long at = e - a.base, column = number(a.indices, a.index_type, at) - a.base;
            const T value = operation == CONJUGATE ? conjugate(values[at]) : values[at];
            if (operation == NONE) sums[row] += value * from[column];
            else sums[column] += value * from[row];
        }
    T* const to = static_cast<T*>(y.values);
    for (long i = 0; i < y.count; ++i) to[i] = beta == T(0) ? alpha * sums[i] : alpha * sums[i] + beta * to[i];
}

template <class T>
int later(Handle* handle, int operation, const void* alpha, const Rows* a, const Vector* x, const void* beta, Vector* y) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    const T scale = *static_cast<const T*>(alpha), kept = *static_cast<const T*>(beta);
    return device::enqueue(handle->stream, [=, matrix = *a, from = *x, to = *y] {
        multiply<T>(matrix, operation, scale, from, kept, to);
        return cudaSuccess;
    });
}

}  // namespace

API int cusparseCreate(Handle** handle) { *handle = new Handle{}; return SUCCESS; }
API int cusparseDestroy(Handle* handle) { delete handle; return SUCCESS; }
API int cusparseGetVersion(Handle*, int* version) { *version = 12509; return SUCCESS; }
API int cusparseSetStream(Handle* handle, cudaStream_t stream) { handle->stream = stream; return SUCCESS; }
API int cusparseGetStream(Handle* handle, cudaStream_t* stream) { *stream = handle->stream; return SUCCESS; }
API int cusparseSetPointerMode(Handle*, int) { return SUCCESS; }
API int cusparseCreateMatDescr(int** description) { *description = new int(0); return SUCCESS; }
API int cusparseDestroyMatDescr(int* description) { delete description; return SUCCESS; }
API int cusparseSetMatType(int*, int) { return SUCCESS; }
API int cusparseSetMatIndexBase(int*, int) { return SUCCESS; }

API int cusparseCreateCsr(Rows** matrix, long rows, long columns, long, void* offsets, void* indices, void* values,
                          int offset_type, int index_type, int base, int) {
    *matrix = new Rows{rows, columns, offsets, indices, values, offset_type, index_type, base};
    return SUCCESS;
}
API int cusparseDestroySpMat(Rows* matrix) { delete matrix; return SUCCESS; }
API int cusparseCreateDnVec(Vector** vector, long count, void* values, int) {
    *vector = new Vector{count, values};
    return SUCCESS;
}
API int cusparseDestroyDnVec(Vector* vector) { delete vector; return SUCCESS; }
API int cusparseSpMV_bufferSize(Handle*, int, const void*, Rows*, Vector*, const void*, Vector*, int, int, size_t* bytes) {
    *bytes = 1;
    return SUCCESS;
}
API int cusparseSpMV(Handle* handle, int operation, const void* alpha, Rows* matrix, Vector* x, const void* beta, Vector* y,
                     int type, int, void*) {
    switch (type) {
        case FLOAT: return later<float>(handle, operation, alpha, matrix, x, beta, y);
        case DOUBLE: return later<double>(handle, operation, alpha, matrix, x, beta, y);
        case COMPLEX: return later<std::complex<float>>(handle, operation, alpha, matrix, x, beta, y);
        case DOUBLE_COMPLEX: return later<std::complex<double>>(handle, operation, alpha, matrix, x, beta, y);
    }
    return NOT_SUPPORTED;
}
