// One function for each operation adds it to the module.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

namespace patchreg {

void bind_lncc(nanobind::module_& module);
void bind_mutual_information(nanobind::module_& module);
void bind_warp(nanobind::module_& module);

// Addresses come from Tensor.data_ptr(); 0 stands for an absent tensor.
template <class T> T* at(std::uintptr_t address) { return reinterpret_cast<T*>(address); }

}  // namespace patchreg
