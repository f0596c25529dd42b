// What limits the kernels of kernels/, alone: atomic additions to memory, a transposition, a launch.
// Constants: THREADS, COLUMNS (the edge of a square tile).

// The empty kernel: what a launch costs.
extern "C" __global__ void __launch_bounds__(THREADS, 1) nothing(Sum* to) {}

// Thread i adds 1 to cells i, i + threads, ... of `count`, taken modulo `cells`: with cells == count all differ, with
// few cells all threads meet in them.
extern "C" __global__ void __launch_bounds__(THREADS, 1) add_one(Sum* to, Index count, Index cells) {
    const Index step = Index(gridDim.x) * blockDim.x;
    for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) atomic_add(to + i % cells, Sum(1));
}

// The same, four neighbours at a time; cells is a multiple of 4.
extern "C" __global__ void __launch_bounds__(THREADS, 1) add_four(Sum* to, Index count, Index cells) {
    const Index step = Index(gridDim.x) * blockDim.x;
    for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; 4 * i < count; i += step) {
        atomic_add(to + 4 * i % cells, make_float4(1, 1, 1, 1));
    }
}

// y = x transposed, square matrices of a multiple of COLUMNS rows, through a tile in shared memory; a block of COLUMNS
// by COLUMNS / 4 threads.
extern "C" __global__ void __launch_bounds__(THREADS, 1) transpose(const Sum* x, Sum* y, Index rows) {
    __shared__ Sum tile[COLUMNS][COLUMNS + 1];  // one more, so that columns lie in different banks
    const Index tiles = rows / COLUMNS;
    const Index top = Index(blockIdx.x) / tiles * COLUMNS, left = Index(blockIdx.x) % tiles * COLUMNS;
    const int column = threadIdx.x % COLUMNS, first = threadIdx.x / COLUMNS;
    for (int r = first; r < COLUMNS; r += THREADS / COLUMNS) tile[r][column] = x[(top + r) * rows + left + column];
    __syncthreads();
    for (int r = first; r < COLUMNS; r += THREADS / COLUMNS) y[(left + r) * rows + top + column] = tile[column][r];
}
