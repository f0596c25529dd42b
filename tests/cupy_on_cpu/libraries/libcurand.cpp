// libcurand: the generators that cupy.random makes, with numbers of the C++ standard library instead of cuRAND's.
#include "device.hpp"

#include <memory>
#include <random>

namespace {

constexpr int SUCCESS = 0;

struct Generator {
    std::mt19937_64 engine;
    cudaStream_t stream;
};

template <class T, class Draw> int fill(Generator* generator, T* to, size_t count, Draw draw) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    auto drawn = std::make_shared<std::vector<T>>(count);
    for (T& value : *drawn) value = draw(generator->engine);
    return device::enqueue(generator->stream, [=] {
        std::copy(drawn->begin(), drawn->end(), to);
        return cudaSuccess;
    });
}

// Returns a number in (0, 1], as cuRAND does.
template <class T, int BITS> T uniform(std::mt19937_64& engine) { return std::ldexp(T((engine() >> (64 - BITS)) + 1), -BITS); }

}  // namespace

API int curandCreateGenerator(Generator** generator, int) { *generator = new Generator{}; return SUCCESS; }
API int curandDestroyGenerator(Generator* generator) { delete generator; return SUCCESS; }
API int curandGetVersion(int* version) { *version = 10309; return SUCCESS; }
API int curandSetStream(Generator* generator, cudaStream_t stream) { generator->stream = stream; return SUCCESS; }
API int curandSetPseudoRandomGeneratorSeed(Generator* generator, unsigned long long seed) {
    generator->engine.seed(seed);
    return SUCCESS;
}
API int curandSetGeneratorOffset(Generator* generator, unsigned long long offset) {
    generator->engine.discard(offset);
    return SUCCESS;
}
API int curandSetGeneratorOrdering(Generator*, int) { return SUCCESS; }
API int curandGenerate(Generator* generator, unsigned* to, size_t count) {
    return fill(generator, to, count, [](auto& engine) { return unsigned(engine() >> 32); });
}
API int curandGenerateLongLong(Generator* generator, unsigned long long* to, size_t count) {
    return fill(generator, to, count, [](auto& engine) { return (unsigned long long)engine(); });
}
API int curandGenerateUniform(Generator* generator, float* to, size_t count) {
    return fill(generator, to, count, uniform<float, 24>);
}
API int curandGenerateUniformDouble(Generator* generator, double* to, size_t count) {
    return fill(generator, to, count, uniform<double, 53>);
}
API int curandGenerateNormal(Generator* generator, float* to, size_t count, float mean, float deviation) {
    return fill(generator, to, count, std::normal_distribution<float>(mean, deviation));
}
API int curandGenerateNormalDouble(Generator* generator, double* to, size_t count, double mean, double deviation) {
    return fill(generator, to, count, std::normal_distribution<double>(mean, deviation));
}
