// Types and instructions that C++ lacks: storage types, and thin functions around PTX. All PTX is in this file.
//
// Nothing is included, so NVRTC alone compiles this file. Where an architecture lacks an instruction, the function is
// either implemented with others (bfloat16 conversion, vector atomics) or not defined, so that a use of it does not
// compile (cp.async, bfloat16 and TF32 products below sm_80).

#define DEVICE __device__ __forceinline__

// Declares dynamic shared memory, whose size the launch gives, as an array of T called name.
#define DYNAMIC_SHARED(T, name)                                       \
    extern __shared__ __align__(16) unsigned char name##_bytes[];     \
    T* const name = reinterpret_cast<T*>(name##_bytes)

struct half { unsigned short bits; };      // storage only; arithmetic is in float
struct bfloat16 { unsigned short bits; };  // storage only

template <class T> struct __align__(8) Complex { T real, imag; };

// Keeps a value in its register. Without it the compiler computes cheap values again in each iteration of a loop.
DEVICE void keep(int& value) { asm volatile("" : "+r"(value)); }
DEVICE void keep(long long& value) { asm volatile("" : "+l"(value)); }

// ---------------------------------------------------------------------------------------------- conversion

DEVICE float to_float(half h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
}

DEVICE half to_half(float f) {
    half h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
    return h;
}

DEVICE float to_float(bfloat16 b) { return __uint_as_float(unsigned(b.bits) << 16); }

#if __CUDA_ARCH__ >= 800
DEVICE bfloat16 to_bfloat16(float f) {
    bfloat16 b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(f));
    return b;
}
#else
// To the nearest, ties to even: adds just under half of the last place that is kept, and truncates. NaN is returned
// separately, because the addition could turn it into Inf.
DEVICE bfloat16 to_bfloat16(float f) {
    const unsigned u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {(unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
#endif

#if __CUDA_ARCH__ >= 800
// Returns the nearest TF32 number, ties away from zero, as the bits of a float. Finite numbers stay finite: those that
// cvt.rna.tf32 rounds to Inf are truncated. The instructions are as many.
DEVICE unsigned to_tf32(float f) {
    const unsigned bits = __float_as_uint(f), half_step = 0x1000;
    return (fabsf(f) < 0x1.ffep127f ? bits + half_step : bits) & 0xffffe000;
}
#endif

// ---------------------------------------------------------------------------------------------- atomic addition
// Atomic additions to global memory. They return no value, so the thread does not wait for them.

DEVICE void atomic_add(float* to, float value) { atomicAdd(to, value); }
#if __CUDA_ARCH__ >= 600
DEVICE void atomic_add(double* to, double value) { atomicAdd(to, value); }
#endif

DEVICE void atomic_add(float* to, float2 value) {  // to: aligned to 8 bytes
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(value.x), "f"(value.y) : "memory");
#else
    atomicAdd(to, value.x);
    atomicAdd(to + 1, value.y);
#endif
}

DEVICE void atomic_add(float* to, float4 value) {  // to: aligned to 16 bytes
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#else
    atomicAdd(to, value.x);
    atomicAdd(to + 1, value.y);
    atomicAdd(to + 2, value.z);
    atomicAdd(to + 3, value.w);
#endif
}

// ---------------------------------------------------------------------------------------------- asynchronous copies

// Returns the address in the shared memory space that PTX instructions take.
DEVICE unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

#if __CUDA_ARCH__ >= 800
// Starts an asynchronous copy of BYTES (4, 8 or 16) from global to shared memory. Only the first `present` bytes are
// read; the others are filled with zeros. Both addresses must be multiples of BYTES.
template <int BYTES> DEVICE void copy_async(void* to, const void* from, int present = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(shared_address(to)), "l"(from), "r"(present) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(present) : "memory");
}

// Commits the copies that this thread started since the last commit as one group.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING groups of this thread are pending. Other threads see the data after a barrier.
template <int PENDING> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
#endif

// ---------------------------------------------------------------------------------------------- warp matrix products
// d += a b, where each lane holds a fragment of a, b and d. The comments below list the (row, column) of the elements
// of a fragment, in the order of its registers, with g = lane / 4 and t = lane % 4. Two 16-bit elements share a
// register; the lower half holds the one with the lower column (of a) or row (of b).

// Loads four 8x8 matrices of 16-bit elements. Lane 8 m + r passes the address of row r of matrix m, a multiple of 16
// bytes. result[m] receives the elements (g, 2t) and (g, 2t + 1) of matrix m.
DEVICE void load_matrices(unsigned (&result)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same with each matrix transposed: result[m] receives the elements (2t, g) and (2t + 1, g).
DEVICE void load_matrices_transposed(unsigned (&result)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row)) : "memory");
}

#if __CUDA_ARCH__ >= 800
// d 16x8: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1) in all products except those of float64.
// a 16x16: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..); b 16x8: (2t.., g) (2t+8.., g).
DEVICE void multiply_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void multiply_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// TF32: a 16x8: (g, t) (g+8, t) (g, t+4) (g+8, t+4); b 8x8: (t, g) (t+4, g).
DEVICE void multiply_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float64: d 8x8: (g, 2t) (g, 2t+1); a 8x4: (g, t); b 4x8: (t, g).
DEVICE void multiply_8x8x4(double (&d)[2], double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d[0]), "+d"(d[1]) : "d"(a), "d"(b));
}
#endif
