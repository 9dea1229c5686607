// Runs CUDA kernels on the CPU, for tests: what is launched is the .cu text itself, compiled by g++.
//
// Every CUDA thread is a fiber with a stack of its own; a block's fibers take turns and change over only where they wait
// for each other, so that a run is deterministic. Blocks run one after another. Found on the way, as an error with the
// block and the thread: barriers that not all threads reach, memory accesses outside an argument or outside a shared
// array, undefined behaviour (signed overflow, misaligned vectors, ...), and launches that no device would take.
// Shared memory starts as NaN. Missing barriers show as a result that depends on the order of the threads.
#pragma once
#define PATCHREG_EMULATION 1
#include "cuda_words.h"
#include "fibers.h"
#include "guarded_memory.h"
#include "request.h"
