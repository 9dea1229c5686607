#include "memory.h"

#include <stdexcept>
#include <string>

namespace patchreg {

void throw_out_of_memory(i64 bytes) {
    throw std::runtime_error("patchreg: no memory for " + std::to_string(bytes) + " bytes of scratch");
}

}  // namespace patchreg
