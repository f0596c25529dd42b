// libnvrtc: the documented functions of NVRTC. A source is compiled by Python (tests/cupy_on_cpu/compiler.py), with g++.
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

enum Result { SUCCESS = 0, INVALID_OPTION = 5, COMPILATION = 6, NO_EXPRESSION = 10 };

struct Program {
    std::string source, name, log, code;
    std::map<std::string, std::string> headers;
    std::vector<std::string> expressions;
    std::map<std::string, std::string> lowered;
};

// Compiles a program and returns the result by emulated_compiled.
using Compile = int (*)(Program* program, const char* source, const char* name, int options, const char* const* option,
                        int expressions, const char* const* expression, int headers, const char* const* header_name,
                        const char* const* header);
Compile compile;

std::vector<const char*> pointers(const std::vector<std::string>& texts) {
    std::vector<const char*> found;
    for (const std::string& text : texts) found.push_back(text.c_str());
    return found;
}

}  // namespace

API void emulated_compiler(Compile given) { compile = given; }
API void emulated_compiled(Program* program, const char* code, size_t bytes, const char* log) {
    program->code.assign(code, bytes);
    program->log = log;
}
API void emulated_lowered(Program* program, const char* expression, const char* name) {
    program->lowered[expression] = name;
}

API const char* nvrtcGetErrorString(int result) {
    return result == SUCCESS          ? "NVRTC_SUCCESS"
           : result == INVALID_OPTION ? "NVRTC_ERROR_INVALID_OPTION"
           : result == COMPILATION    ? "NVRTC_ERROR_COMPILATION"
           : result == NO_EXPRESSION  ? "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID"
                                      : "NVRTC_ERROR_INTERNAL_ERROR";
}
API int nvrtcVersion(int* major, int* minor) {
    *major = 12;
    *minor = 9;
    return SUCCESS;
}
static const int ARCHITECTURES[] = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90};
API int nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof ARCHITECTURES / sizeof *ARCHITECTURES;
    return SUCCESS;
}
API int nvrtcGetSupportedArchs(int* architectures) {
    memcpy(architectures, ARCHITECTURES, sizeof ARCHITECTURES);
    return SUCCESS;
}

API int nvrtcCreateProgram(Program** program, const char* source, const char* name, int headers,
                           const char* const* contents, const char* const* names) {
    *program = new Program{source, name ? name : "default_program", "", "", {}, {}, {}};
    for (int i = 0; i < headers; ++i) (*program)->headers[names[i]] = contents[i];
    return SUCCESS;
}
API int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}
API int nvrtcAddNameExpression(Program* program, const char* expression) {
    program->expressions.push_back(expression);
    return SUCCESS;
}
API int nvrtcGetLoweredName(Program* program, const char* expression, const char** name) {
    const auto found = program->lowered.find(expression);
    if (found == program->lowered.end()) return NO_EXPRESSION;
    *name = found->second.c_str();
    return SUCCESS;
}
API int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    std::vector<const char*> names, contents;
    for (const auto& [name, content] : program->headers) {
        names.push_back(name.c_str());
        contents.push_back(content.c_str());
    }
    const auto expressions = pointers(program->expressions);
    return compile(program, program->source.c_str(), program->name.c_str(), count, options, int(expressions.size()),
                   expressions.data(), int(names.size()), names.data(), contents.data());
}

static int give(const std::string& text, char* to, size_t end) {
    memcpy(to, text.c_str(), text.size() + end);
    return SUCCESS;
}
API int nvrtcGetPTXSize(Program* program, size_t* bytes) { *bytes = program->code.size() + 1; return SUCCESS; }
API int nvrtcGetPTX(Program* program, char* to) { return give(program->code, to, 1); }
API int nvrtcGetCUBINSize(Program* program, size_t* bytes) { *bytes = program->code.size(); return SUCCESS; }
API int nvrtcGetCUBIN(Program* program, char* to) { return give(program->code, to, 0); }
API int nvrtcGetProgramLogSize(Program* program, size_t* bytes) { *bytes = program->log.size() + 1; return SUCCESS; }
API int nvrtcGetProgramLog(Program* program, char* to) { return give(program->log, to, 1); }
