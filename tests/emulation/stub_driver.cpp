// A CUDA driver that does nothing but write down, one line a call, what it is asked: for tests of the calls themselves.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

// PATCHREG_STUB_LOG names the file; PATCHREG_STUB_PARAMETERS says how many parameters a kernel has.
template <class... Values> void write_down(const char* format, Values... values) {
    FILE* log = fopen(getenv("PATCHREG_STUB_LOG"), "a");
    fprintf(log, format, values...);
    fclose(log);
}

bool asked_to_fail(const char* function) {
    const char* failing = getenv("PATCHREG_STUB_FAILS");
    return failing != nullptr && strcmp(failing, function) == 0;
}

thread_local void* current = nullptr;  // the context

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (*function == nullptr) {
        void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
        *function = dlsym(self, name);
    }
    if (found != nullptr) *found = *function == nullptr;
    return *function == nullptr ? 500 : 0;
}

int cuGetErrorString(int, const char** text) {
    *text = "as asked";
    return 0;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = 10 + ordinal;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    write_down("retain %d\n", device);
    *context = reinterpret_cast<void*>(0x4000);
    return 0;
}

int cuCtxGetCurrent(void** context) {
    *context = current;
    return 0;
}

int cuCtxSetCurrent(void* context) {
    write_down("current %p\n", context);
    current = context;
    return 0;
}

int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
    if (asked_to_fail("cuLibraryLoadData")) return 222;
    if (asked_to_fail("memory")) return 2;
    write_down("load %.3s\n", static_cast<const char*>(code) + 1);
    *library = reinterpret_cast<void*>(0x1000);
    return 0;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    write_down("kernel %p %s\n", library, name);
    *kernel = reinterpret_cast<void*>(0x2000);
    return 0;
}

int cuKernelGetFunction(void** function, void* kernel) {
    if (asked_to_fail("cuKernelGetFunction")) return 209;
    write_down("function of %p\n", kernel);
    *function = reinterpret_cast<void*>(0x3000);
    return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    write_down("attribute %d %d %p\n", attribute, value, function);
    return 0;
}

int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    if (current == nullptr) return 201;
    if (asked_to_fail("cuLaunchKernel")) return 719;
    write_down("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p parameters", kernel, gx, gy, gz, bx, by,
               bz, shared, stream, static_cast<void*>(extra));
    for (int i = 0; i < atoi(getenv("PATCHREG_STUB_PARAMETERS")); ++i) {
        unsigned long long bits;
        memcpy(&bits, parameters[i], sizeof bits);
        write_down(" %llx", bits);
    }
    write_down("\n");
    return 0;
}
}
