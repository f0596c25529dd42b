// One kernel for each function of kernels/primitives.cuh: one warp, a lane an item, results as the registers hold them.
// vectors.py says what goes in. The CPU runs this file with primitives.hpp in front, a GPU with primitives.cuh.

extern "C" __global__ void half_to_float(const half* x, float* y, int count) {
    for (int i = threadIdx.x; i < count; i += 32) y[i] = to_float(x[i]);
}

extern "C" __global__ void float_to_half(const float* x, half* y, int count) {
    for (int i = threadIdx.x; i < count; i += 32) y[i] = to_half(x[i]);
}

extern "C" __global__ void bfloat16_to_float(const bfloat16* x, float* y, int count) {
    for (int i = threadIdx.x; i < count; i += 32) y[i] = to_float(x[i]);
}

extern "C" __global__ void float_to_bfloat16(const float* x, bfloat16* y, int count) {
    for (int i = threadIdx.x; i < count; i += 32) y[i] = to_bfloat16(x[i]);
}

// All lanes add to the same element, and then each to its own.
extern "C" __global__ void atomic_add_float(const float* x, float* y) {
    atomic_add(y, x[threadIdx.x]);
    atomic_add(y + 1 + threadIdx.x, x[threadIdx.x]);
}

extern "C" __global__ void atomic_add_double(const double* x, double* y) {
    atomic_add(y, x[threadIdx.x]);
    atomic_add(y + 1 + threadIdx.x, x[threadIdx.x]);
}

extern "C" __global__ void atomic_add_float2(const float* x, float* y) {
    const float* v = x + 2 * threadIdx.x;
    atomic_add(y, make_float2(v[0], v[1]));
    atomic_add(y + 2 + 2 * threadIdx.x, make_float2(v[0], v[1]));
}

extern "C" __global__ void atomic_add_float4(const float* x, float* y) {
    const float* v = x + 4 * threadIdx.x;
    atomic_add(y, make_float4(v[0], v[1], v[2], v[3]));
    atomic_add(y + 4 + 4 * threadIdx.x, make_float4(v[0], v[1], v[2], v[3]));
}

// Rows of 16 bytes: four 8x8 matrices, one after the other.
extern "C" __global__ void load_matrices_from_rows(const unsigned short* x, unsigned* y) {
    __shared__ __align__(16) unsigned short tile[256];
    for (int i = 0; i < 8; ++i) tile[8 * threadIdx.x + i] = x[8 * threadIdx.x + i];
    __syncthreads();
    unsigned r[4];
    load_matrices(r, &tile[8 * threadIdx.x]);
    for (int m = 0; m < 4; ++m) y[4 * threadIdx.x + m] = r[m];
}

extern "C" __global__ void load_matrices_from_columns(const unsigned short* x, unsigned* y) {
    __shared__ __align__(16) unsigned short tile[256];
    for (int i = 0; i < 8; ++i) tile[8 * threadIdx.x + i] = x[8 * threadIdx.x + i];
    __syncthreads();
    unsigned r[4];
    load_matrices_transposed(r, &tile[8 * threadIdx.x]);
    for (int m = 0; m < 4; ++m) y[4 * threadIdx.x + m] = r[m];
}

// Matrix products take and give each lane's registers, lane after lane.
#if __CUDA_ARCH__ >= 800

extern "C" __global__ void float_to_tf32(const float* x, unsigned* y, int count) {
    for (int i = threadIdx.x; i < count; i += 32) y[i] = to_tf32(x[i]);
}

template <int BYTES> DEVICE void copy_with_zeros(const unsigned char* x, unsigned char* y) {
    __shared__ __align__(16) unsigned char tile[32 * BYTES];
    const int first = BYTES * threadIdx.x;
    for (int i = 0; i < BYTES; ++i) tile[first + i] = 0x55;
    __syncthreads();
    copy_async<BYTES>(&tile[first], &x[first], threadIdx.x % (BYTES + 1));  // the first bytes only
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < BYTES; ++i) y[first + i] = tile[first + i];
}
extern "C" __global__ void copy_async_4(const unsigned char* x, unsigned char* y) { copy_with_zeros<4>(x, y); }
extern "C" __global__ void copy_async_8(const unsigned char* x, unsigned char* y) { copy_with_zeros<8>(x, y); }
extern "C" __global__ void copy_async_16(const unsigned char* x, unsigned char* y) { copy_with_zeros<16>(x, y); }

struct Registers { unsigned a[4], b[2]; float d[4]; };
DEVICE Registers registers_of_lane(const unsigned* a, const unsigned* b, const float* d) {
    Registers r;
    for (int i = 0; i < 4; ++i) r.a[i] = a[4 * threadIdx.x + i];
    for (int i = 0; i < 2; ++i) r.b[i] = b[2 * threadIdx.x + i];
    for (int i = 0; i < 4; ++i) r.d[i] = d[4 * threadIdx.x + i];
    return r;
}
DEVICE void store(float* d, const Registers& r) {
    for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = r.d[i];
}

extern "C" __global__ void multiply_half_k16(const unsigned* a, const unsigned* b, float* d) {
    Registers r = registers_of_lane(a, b, d);
    multiply_16x8x16(r.d, r.a, r.b, half{});
    store(d, r);
}

extern "C" __global__ void multiply_bfloat16_k16(const unsigned* a, const unsigned* b, float* d) {
    Registers r = registers_of_lane(a, b, d);
    multiply_16x8x16(r.d, r.a, r.b, bfloat16{});
    store(d, r);
}

extern "C" __global__ void multiply_tf32_k8(const unsigned* a, const unsigned* b, float* d) {
    Registers r = registers_of_lane(a, b, d);
    multiply_16x8x8_tf32(r.d, r.a, r.b);
    store(d, r);
}

extern "C" __global__ void multiply_double_k4(const double* a, const double* b, double* d) {
    const int lane = threadIdx.x;
    double sum[2] = {d[2 * lane], d[2 * lane + 1]};
    multiply_8x8x4(sum, a[lane], b[lane]);
    d[2 * lane] = sum[0];
    d[2 * lane + 1] = sum[1];
}

#endif
