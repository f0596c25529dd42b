// libcublas: the matrix products that CuPy calls, as simple loops. float16 and bfloat16 are summed in float32.
#include "device.hpp"

#include <algorithm>
#include <complex>
#include <cstring>
#include <vector>

namespace {

using device::enqueue;

struct Bfloat16 {
    unsigned short bits;
    Bfloat16() = default;
    explicit Bfloat16(float value) { *this = value; }
    operator float() const {
        const unsigned wide = unsigned(bits) << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    Bfloat16& operator=(float value) {
        unsigned wide;
        memcpy(&wide, &value, sizeof wide);
        bits = value != value ? 0x7fff : static_cast<unsigned short>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
        return *this;
    }
};

template <class T> T conjugate(T value) { return value; }
template <class T> std::complex<T> conjugate(std::complex<T> value) { return std::conj(value); }

enum Operation { NONE, TRANSPOSE, CONJUGATE };

// Matrices are in column-major order.
struct Shape {
    int a_operation, b_operation, rows, columns, terms;
};
struct Matrix {
    const void* data;
    long step;
};

template <class T, class Sum> Sum element(const Matrix& m, int operation, long row, long column) {
    const T* const data = static_cast<const T*>(m.data);
    const Sum value = operation == NONE ? Sum(data[row + column * m.step]) : Sum(data[column + row * m.step]);
    return operation == CONJUGATE ? conjugate(value) : value;
}

template <class T, class Sum> void multiply(Shape shape, Sum alpha, Matrix a, Matrix b, Sum beta, void* result, long step) {
    T* const c = static_cast<T*>(result);
    std::vector<Sum> sums(shape.rows);
    for (long j = 0; j < shape.columns; ++j) {
        std::fill(sums.begin(), sums.end(), Sum(0));
        for (long k = 0; k < shape.terms; ++k) {
            const Sum factor = element<T, Sum>(b, shape.b_operation, k, j);
            for (long i = 0; i < shape.rows; ++i) sums[i] += element<T, Sum>(a, shape.a_operation, i, k) * factor;
        }
        for (long i = 0; i < shape.rows; ++i) {
            T& to = c[i + j * step];
            to = beta == Sum(0) ? T(alpha * sums[i]) : T(alpha * sums[i] + beta * Sum(to));
        }
    }
}
// cudaDataType
enum Type { FLOAT = 0, DOUBLE = 1, HALF = 2, COMPLEX = 4, DOUBLE_COMPLEX = 5, BFLOAT16 = 14 };
constexpr int SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15;

struct Handle {
    cudaStream_t stream;
    int pointer_mode, math_mode;
};

template <class T, class Sum>
int later(Handle* handle, Shape shape, const void* alpha, Matrix a, Matrix b, const void* beta, void* c, long step) {
    const Sum scale = *static_cast<const Sum*>(alpha), kept = *static_cast<const Sum*>(beta);
    return enqueue(handle->stream, [=] {
        multiply<T, Sum>(shape, scale, a, b, kept, c, step);
        return cudaSuccess;
    });
}

// Returns whether the leading dimension is at least the length of a column.
bool has_room(int operation, int rows, int columns, long step) { return step >= std::max(1, operation == NONE ? rows : columns); }

int product(Handle* handle, int type, Shape shape, const void* alpha, Matrix a, Matrix b, const void* beta, void* c, long step) {
    if (!has_room(shape.a_operation, shape.rows, shape.terms, a.step) ||
        !has_room(shape.b_operation, shape.terms, shape.columns, b.step) || !has_room(NONE, shape.rows, shape.columns, step))
        return INVALID_VALUE;
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    const bool is_empty = shape.rows == 0 || shape.columns == 0 || shape.terms == 0;
    for (const void* data : {a.data, b.data, static_cast<const void*>(c)})
        if (!is_empty && !device::region_of(data)) return EXECUTION_FAILED;  // host memory
    switch (type) {
        case FLOAT: return later<float, float>(handle, shape, alpha, a, b, beta, c, step);
        case DOUBLE: return later<double, double>(handle, shape, alpha, a, b, beta, c, step);
        case HALF: return later<_Float16, float>(handle, shape, alpha, a, b, beta, c, step);
        case BFLOAT16: return later<Bfloat16, float>(handle, shape, alpha, a, b, beta, c, step);
        case COMPLEX: return later<std::complex<float>, std::complex<float>>(handle, shape, alpha, a, b, beta, c, step);
        case DOUBLE_COMPLEX:
            return later<std::complex<double>, std::complex<double>>(handle, shape, alpha, a, b, beta, c, step);
    }
    return NOT_SUPPORTED;
}

// cublasComputeType_t
enum Sums { SUMS_32 = 68, PEDANTIC_32, SUMS_64, PEDANTIC_64, FAST_16F = 74, FAST_16BF, FAST_TF32 = 77 };
bool is_double(int type) { return type == DOUBLE || type == DOUBLE_COMPLEX; }
int plain_sums(int type) { return is_double(type) ? SUMS_64 : SUMS_32; }

// Returns whether the documentation lists this compute type for this matrix type; sums in float16 are not emulated.
bool sums_in(int compute, int type) {
    if (is_double(type)) return compute == SUMS_64 || compute == PEDANTIC_64;
    if (compute == SUMS_32 || compute == PEDANTIC_32) return true;
    return type != HALF && type != BFLOAT16 && (compute == FAST_16F || compute == FAST_16BF || compute == FAST_TF32);
}

long width(int type) { return type == HALF || type == BFLOAT16 ? 2 : type == FLOAT ? 4 : type == DOUBLE_COMPLEX ? 16 : 8; }

}  // namespace

API int cublasCreate_v2(Handle** handle) { *handle = new Handle{}; return SUCCESS; }
API int cublasDestroy_v2(Handle* handle) { delete handle; return SUCCESS; }
API int cublasGetVersion_v2(Handle*, int* version) { *version = 120900; return SUCCESS; }
API int cublasSetStream_v2(Handle* handle, cudaStream_t stream) { handle->stream = stream; return SUCCESS; }
API int cublasGetStream_v2(Handle* handle, cudaStream_t* stream) { *stream = handle->stream; return SUCCESS; }
API int cublasSetMathMode(Handle* handle, int mode) { handle->math_mode = mode; return SUCCESS; }
API int cublasGetMathMode(Handle* handle, int* mode) { *mode = handle->math_mode; return SUCCESS; }
API int cublasSetPointerMode_v2(Handle* handle, int mode) { handle->pointer_mode = mode; return SUCCESS; }
API int cublasGetPointerMode_v2(Handle* handle, int* mode) { *mode = handle->pointer_mode; return SUCCESS; }

API int cublasGemmEx(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                     const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int) {
    if (a_type != b_type || b_type != c_type || !sums_in(compute, a_type)) return NOT_SUPPORTED;
    return product(h, a_type, {op_a, op_b, m, n, k}, alpha, {a, lda}, {b, ldb}, beta, c, ldc);
}
API int cublasSgemmEx(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                      const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc) {
    return cublasGemmEx(h, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, SUMS_32, 0);
}
API int cublasGemmStridedBatchedEx(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                                   int a_type, int lda, long long a_apart, const void* b, int b_type, int ldb,
                                   long long b_apart, const void* beta, void* c, int c_type, int ldc, long long c_apart,
                                   int count, int compute, int) {
    for (long i = 0; i < count; ++i) {
        const void* const one = static_cast<const char*>(a) + i * a_apart * width(a_type);
        const void* const other = static_cast<const char*>(b) + i * b_apart * width(b_type);
        void* const result = static_cast<char*>(c) + i * c_apart * width(c_type);
        const int status = cublasGemmEx(h, op_a, op_b, m, n, k, alpha, one, a_type, lda, other, b_type, ldb, beta, result,
                                        c_type, ldc, compute, 0);
        if (status) return status;
    }
    return SUCCESS;
}

#define PRODUCTS_OF(letter, type)                                                                                             \
    API int cublas##letter##gemm_v2(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,     \
                                    int lda, const void* b, int ldb, const void* beta, void* c, int ldc) {                    \
        return cublasGemmEx(h, op_a, op_b, m, n, k, alpha, a, type, lda, b, type, ldb, beta, c, type, ldc,                    \
                            plain_sums(type), 0);                                                                             \
    }                                                                                                                         \
    API int cublas##letter##gemmStridedBatched(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha,         \
                                               const void* a, int lda, long long a_apart, const void* b, int ldb,             \
                                               long long b_apart, const void* beta, void* c, int ldc, long long c_apart,      \
                                               int count) {                                                                   \
        return cublasGemmStridedBatchedEx(h, op_a, op_b, m, n, k, alpha, a, type, lda, a_apart, b, type, ldb, b_apart, beta,  \
                                          c, type, ldc, c_apart, count, plain_sums(type), 0);                                 \
    }                                                                                                                         \
    API int cublas##letter##gemmBatched(Handle* h, int op_a, int op_b, int m, int n, int k, const void* alpha,                \
                                        const void* const* a, int lda, const void* const* b, int ldb, const void* beta,       \
                                        void* const* c, int ldc, int count) {                                                 \
        cudaStreamSynchronize(h->stream); /* the pointers are read now */                                                     \
        int status = SUCCESS;                                                                                                 \
        for (int i = 0; i < count && status == SUCCESS; ++i)                                                                  \
            status = cublas##letter##gemm_v2(h, op_a, op_b, m, n, k, alpha, a[i], lda, b[i], ldb, beta, c[i], ldc);           \
        return status;                                                                                                        \
    }
PRODUCTS_OF(S, FLOAT)
PRODUCTS_OF(D, DOUBLE)
PRODUCTS_OF(C, COMPLEX)
PRODUCTS_OF(Z, DOUBLE_COMPLEX)

// ---------------------------------------------------------------------------------------------- vectors

// Writes a scalar result to the host, which waits for it, or to the device.
template <class Work> int reduced(Handle* handle, Work work) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    const cudaError_t error = enqueue(handle->stream, [=] {
        work();
        return cudaSuccess;
    });
    return error == cudaSuccess && handle->pointer_mode == 0 ? cudaStreamSynchronize(handle->stream) : error;
}

template <class T, class Real> int norm(Handle* handle, int count, const T* x, int step, Real* result) {
    return reduced(handle, [=] {
        double sum = 0;
        for (long i = 0; i < count; ++i) sum += std::norm(std::complex<double>(x[i * step]));
        *result = Real(std::sqrt(sum));
    });
}
template <class T> int dot(Handle* handle, int count, const T* x, int x_step, const T* y, int y_step, T* result, bool conjugated) {
    return reduced(handle, [=] {
        T sum = 0;
        for (long i = 0; i < count; ++i) sum += (conjugated ? conjugate(x[i * x_step]) : x[i * x_step]) * y[i * y_step];
        *result = sum;
    });
}
using Complex = std::complex<float>;
using DoubleComplex = std::complex<double>;

API int cublasSnrm2_v2(Handle* h, int n, const float* x, int step, float* result) { return norm(h, n, x, step, result); }
API int cublasDnrm2_v2(Handle* h, int n, const double* x, int step, double* result) { return norm(h, n, x, step, result); }
API int cublasScnrm2_v2(Handle* h, int n, const Complex* x, int step, float* result) { return norm(h, n, x, step, result); }
API int cublasDznrm2_v2(Handle* h, int n, const DoubleComplex* x, int step, double* result) {
    return norm(h, n, x, step, result);
}
#define DOT(name, T, conjugated)                                                                                              \
    API int cublas##name##_v2(Handle* h, int n, const T* x, int x_step, const T* y, int y_step, T* result) {                   \
        return dot(h, n, x, x_step, y, y_step, result, conjugated);                                                           \
    }
DOT(Sdot, float, false)
DOT(Ddot, double, false)
DOT(Cdotu, Complex, false)
DOT(Cdotc, Complex, true)
DOT(Zdotu, DoubleComplex, false)
DOT(Zdotc, DoubleComplex, true)
